"""Servers die at any moment of a session; what it computes is what it would have computed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from petals.client.session_rows import SessionRows
from petals.errors import MissingBlocksError
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId
from real_swarm import ALL, HIDDEN, RealSwarm, real_swarm, states
from served_span import assert_close

SPANS = (BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(4, 5))
STATE_BYTES = HIDDEN * 4
"""Whatever is written at once and is longer carries states."""

IMPATIENT = {"silence_timeout": 1.0, "max_pinged": 0, "connect_timeout": 1.0, "show_route": False}
"""Four servers and their client share one loop here, which the sums of all of them can hold up for
some tenths of a second: less patience would take that for a death.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


@dataclass
class Fault:
    """Happens once, at the next states that ``victim`` is sent, or sends."""

    swarm: RealSwarm
    victim: PeerId
    kind: str
    when: str
    is_armed: bool = False
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def arm(self) -> None:
        self.is_armed = True
        self.swarm.net.on_write = self._see

    def _see(self, source: PeerId, target: PeerId, num_bytes: int) -> None:
        who = target if self.when == "asked" else source
        if self.is_armed and num_bytes > STATE_BYTES and who == self.victim:
            self.is_armed = False
            self.happened.set()
            strike(self.swarm, self.victim, self.kind)


def strike(swarm: RealSwarm, victim: PeerId, kind: str) -> None:
    match kind:
        case "kill":
            swarm.net.kill(victim)
        case "pause":
            swarm.net.pause(victim)
        case "cut":
            for other in list(swarm.net.transports):
                swarm.net.cut(victim, other)
        case "mute":
            for other in list(swarm.net.transports):
                swarm.net.cut(victim, other, one_way=True)


@dataclass
class Story:
    """A session of two rows and what each of them holds."""

    swarm: RealSwarm
    session: SessionRows
    rows: list[Tensor]

    async def step(self, starts: list[int], news: list[Tensor], reorder: object = None) -> None:
        counts = [len(new) for new in news]
        output = await self.session.step(torch.cat(news), starts, counts, reorder)
        before = self.rows if reorder is None else [self.rows[row] for row in reorder]
        self.rows = [torch.cat([row[:at], new]) for row, at, new in zip(before, starts, news)]
        for row, at, part in zip(self.rows, starts, torch.split(output, counts)):
            assert_close(part, self.swarm.expected(row)[at:])

    async def prefill(self) -> None:
        await self.step([0, 0], [states(23, 1), states(9, 2)])

    async def decode(self, seed: int = 3) -> None:
        at = [len(row) for row in self.rows]
        await self.step(at, [states(1, seed + row) for row in range(len(at))])

    async def rollback(self) -> None:
        await self.step([5, 9], [states(2, 7), states(1, 8)])

    async def reorder(self) -> None:
        news = [states(1, 4), states(2, 5), states(1, 6)]
        length = len(self.rows[1])
        await self.step([length, 3, length], news, reorder=(1, 0, 1))

    async def tell(self, phase: str, strikes: Callable[[], None]) -> None:
        """Prefill, decode, ``phase`` with a fault in it, and on."""
        if phase == "prefill":
            strikes()
        await self.prefill()
        await self.decode()
        if phase != "prefill":
            strikes()
            await getattr(self, phase)()
        await self.decode(11)
        await self.rollback() if len(self.rows) == 2 else await self.decode(17)


async def _survives(folder: Path, fault: tuple[str, str, int], phase: str, **options: object):
    kind, when, index = fault
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        access = swarm.access(**(IMPATIENT | {"repair_timeout": 20.0} | options))
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))
        victim = session.trace.hops[index].peer_id
        event = Fault(swarm, victim, kind, when)
        await story.tell(phase, event.arm)
        assert event.happened.is_set()
        trace = session.trace
        assert victim not in {hop.peer_id for hop in trace.hops}
        assert [repair.peer_id for repair in trace.repairs] == [victim]
        assert trace.repairs[0].blocks == SPANS[index]
        assert trace.repairs[0].stall_seconds > 0
        await session.close()
        await access.close()


FAULTS = [
    ("kill", "asked", 0),
    ("kill", "answering", 1),
    ("kill", "asked", 2),
    ("cut", "asked", 1),
    ("pause", "asked", 0),
    ("mute", "answering", 2),
]


@pytest.mark.parametrize("phase", ["prefill", "decode", "rollback", "reorder"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}-{fault[2]}")
async def test_a_death_changes_nothing(
    folder: Path, fault: tuple[str, str, int], phase: str
) -> None:
    await _survives(folder, fault, phase, use_server_to_server=False)


async def test_nobody_left_and_somebody_come_back(folder: Path) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=0.2)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        swarm.net.kill(swarm.peers[1])
        for _ in range(2):
            with pytest.raises(MissingBlocksError, match="2:4"):
                await story.decode()
        await swarm.add(SPANS[1])
        await story.decode()
        await story.rollback()
        assert [repair.peer_id for repair in session.trace.repairs] == [swarm.peers[1]]
        await session.close()
        await access.close()


async def test_two_at_once_and_one_during_the_repair(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS, SPANS[1]) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        first, second = (session.trace.hops[index].peer_id for index in (0, 1))
        swarm.net.kill(first)
        swarm.net.kill(second)
        others = [peer for peer in swarm.peers if peer in swarm.net.transports]
        replay = next(peer for peer in others if swarm.peers.index(peer) % 3 == 1)
        Fault(swarm, replay, "kill", "asked").arm()
        await story.decode()
        await story.rollback()
        await session.close()
        await access.close()
