"""Servers die at any moment of a session; what it computes is what it would have computed."""

from pathlib import Path

import pytest

from petals.errors import MissingBlocksError
from petals.testing.tiny_models import write_tiny_model
from support.session_script import SPANS, Fault, is_rebuilt, story_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


async def survives(
    folder: Path, fault: tuple[str, str, int], phase: str, **options: object
) -> None:
    kind, when, index = fault
    async with story_in(folder, *SPANS, *SPANS, **options) as story:
        await story.open()
        victim = story.peers[index]
        event = Fault(story.swarm, victim, kind, when)
        await story.tell(phase, event.arm)
        assert event.happened.is_set()
        assert victim not in story.peers
        assert story.repaired == [victim]
        assert not is_rebuilt(story.session), "more than the failed span was filled anew"
        (repair,) = story.session.trace.repairs
        assert repair.blocks == SPANS[index]
        assert repair.stall_seconds > 0


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
    async with story_in(folder, *SPANS, repair_timeout=0.2) as story:
        await story.prefill()
        swarm = story.swarm
        swarm.net.kill(swarm.peers[1])
        for _ in range(2):
            with pytest.raises(MissingBlocksError, match=r"2:4.* since \d\d:\d\d:\d\d\."):
                await story.decode()
        await swarm.add(SPANS[1])
        await story.decode()
        await story.rollback()
        assert story.repaired == [swarm.peers[1]]


async def test_two_at_once_and_one_during_the_repair(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS, SPANS[1]) as story:
        await story.prefill()
        swarm = story.swarm
        for victim in story.peers[:2]:
            swarm.net.kill(victim)
        others = [peer for peer in swarm.peers if peer in swarm.net.transports]
        replay = next(peer for peer in others if swarm.peers.index(peer) % 3 == 1)
        Fault(swarm, replay, "kill", "asked").arm()
        await story.decode()
        await story.rollback()
