"""Servers die at any moment of a session; what it computes is what it would have computed."""

from pathlib import Path

import pytest
import torch

from petals.client.session.rows import SessionRows
from petals.errors import MissingBlocksError
from petals.testing.tiny_models import write_tiny_model
from support.session_script import IMPATIENT, SPANS, Fault, Story, session_id
from support.swarm import ALL, HIDDEN, real_swarm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


async def survives(
    folder: Path, fault: tuple[str, str, int], phase: str, **options: object
) -> None:
    kind, when, index = fault
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        access = swarm.access(**(IMPATIENT | {"repair_timeout": 20.0} | options))
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))
        victim = session.trace.hops[index].peer_id
        first_id = session_id(session)
        event = Fault(swarm, victim, kind, when)
        await story.tell(phase, event.arm)
        assert event.happened.is_set()
        trace = session.trace
        assert victim not in {hop.peer_id for hop in trace.hops}
        assert [repair.peer_id for repair in trace.repairs] == [victim]
        assert session_id(session) == first_id, "more than the failed span was filled anew"
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


@pytest.mark.parametrize("is_ring", [True, False], ids=["ring", "star"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "rollback", "reorder"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}-{fault[2]}")
async def test_a_death_changes_nothing(
    folder: Path, fault: tuple[str, str, int], phase: str, is_ring: bool
) -> None:
    await survives(folder, fault, phase, use_server_to_server=is_ring)


async def test_nobody_left_and_somebody_come_back(folder: Path) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=0.2)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        swarm.net.kill(swarm.peers[1])
        for _ in range(2):
            with pytest.raises(MissingBlocksError, match=r"2:4.* since \d\d:\d\d:\d\d\."):
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
