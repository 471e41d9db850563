"""What befalls a session: a story of steps that must come out right, and faults to put into it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.types import BlockSpan, PeerId
from support.reference import assert_close, states
from support.swarm import ALL, HIDDEN, RealSwarm, real_swarm

SPANS = (BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(4, 5))
STATE_BYTES = HIDDEN * 4
"""Whatever is written at once and is longer carries states."""

IMPATIENT = {"silence_timeout": 1.0, "max_pinged": 0, "connect_timeout": 1.0, "show_route": False}
"""Four servers and their client share one loop here, which the sums of all of them can hold up for
some tenths of a second: less patience would take that for a death.
"""


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
            swarm.kill(victim)
        case "drain":
            swarm.stop(victim)
        case "pause":
            swarm.pause(victim)
        case "cut":
            swarm.partition(victim)
        case "mute":
            swarm.partition(victim, one_way=True)


def is_rebuilt(session: SessionRows) -> bool:
    """Whether no hop is left of the route that the session began with: a hop that has been there
    from the beginning knows request 1.
    """
    return all(hop.steps[0].step_id != 1 for hop in session.trace.hops)


@dataclass
class Story:
    """A session of two rows and what each of them holds."""

    swarm: RealSwarm
    access: SwarmConnection
    session: SessionRows
    rows: list[Tensor]

    @classmethod
    def begin(cls, swarm: RealSwarm, access: SwarmConnection, max_length: int = 60) -> "Story":
        session = SessionRows(access, ALL, max_length=max_length)
        return cls(swarm, access, session, [torch.empty(0, HIDDEN)] * 2)

    @property
    def peers(self) -> list[PeerId]:
        """The servers of the route."""
        return [hop.peer_id for hop in self.session.trace.hops]

    @property
    def repaired(self) -> list[PeerId]:
        """The servers that were replaced."""
        return [repair.peer_id for repair in self.session.trace.repairs]

    async def open(self) -> None:
        await self.session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))

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


class _Heard(logging.Handler):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.event = words, asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.words):
            self.event.set()


@asynccontextmanager
async def logged(words: str, name: str) -> AsyncIterator[None]:
    """Return, after what is done within, once a message that begins with ``words`` is logged."""
    heard, logger = _Heard(words), logging.getLogger(name)
    level = logger.level
    logger.setLevel("INFO")
    logger.addHandler(heard)
    try:
        yield
        async with asyncio.timeout(30):
            await heard.event.wait()
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)


@asynccontextmanager
async def story_in(
    folder: Path, *spans: BlockSpan, servers: dict[str, object] | None = None, **options: object
) -> AsyncIterator[Story]:
    """A story that has not begun, in a swarm of ``spans``. servers: options of ``real_swarm``."""
    async with real_swarm(folder, *spans, **(servers or {})) as swarm:
        access = swarm.connection(**(IMPATIENT | {"repair_timeout": 20.0} | options))
        story = Story.begin(swarm, access)
        yield story
        await story.session.close()
        await access.close()
