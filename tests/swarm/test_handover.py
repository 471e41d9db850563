"""Servers leave politely in the middle of sessions: nobody notices, nothing is lost."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from torch import Tensor

from petals.client.session.hop import HopSession
from petals.errors import SessionClosed
from petals.server.lifecycle import served_span
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from petals.wire.fields import Message
from petals.wire.requests import ReplayRequest
from support import session_script
from support.reference import states
from support.session_script import SPANS, Fault, Story, logged

LEAVES = "The server leaves."
PATIENT = {"silence_timeout": 10.0, "repair_timeout": 20.0}
"""No peer falls silent here, and the loop that all share may be held up."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


def story_in(
    folder: Path,
    *spans: BlockSpan,
    drain_seconds: float = 60.0,
    outbox_bytes: int | None = None,
    **options: object,
) -> AbstractAsyncContextManager[Story]:
    servers = {"drain_seconds": drain_seconds, "outbox_bytes": outbox_bytes}
    return session_script.story_in(folder, *spans, servers=servers, **(PATIENT | options))


def reasons(story: Story) -> list[str]:
    return [repair.reason for repair in story.session.trace.repairs]


async def decode_until(story: Story, tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Token after token, each checked, until all these servers have left."""
    seed = 100
    while not all(task.done() for task in tasks):
        length = max(len(row) for row in story.rows)
        # Rows that are full begin anew, so that this may take as long as it takes.
        at = [len(row) if length < 50 else 5 for row in story.rows]
        await story.step(at, [states(1, seed + row) for row in range(len(at))])
        seed += 10
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("phase", ["prefill", "decode", "rollback", "reorder"])
async def test_a_server_that_leaves_is_not_missed(folder: Path, phase: str, index: int) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.open()
        victim = story.peers[index]
        event = Fault(story.swarm, victim, "drain", "asked")
        await story.tell(phase, event.arm)
        assert event.happened.is_set()
        await decode_until(story, [story.swarm.life(victim)])
        assert victim not in story.peers
        assert reasons(story) == [LEAVES]
        await story.reorder()
        await story.decode()


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_session_that_rests_is_handed_over_too(folder: Path, index: int) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        await story.reorder()
        victim = story.peers[index]
        await story.swarm.stop(victim)
        assert victim not in story.peers
        await story.decode()
        assert reasons(story) == [LEAVES]


async def test_a_session_that_has_not_begun_moves_at_once(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.open()
        victim = story.peers[1]
        await story.swarm.stop(victim)
        assert victim not in story.peers
        await story.prefill()
        await story.decode()


@pytest.fixture
def no_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that cannot go on with each other's keys and values, as in several precisions."""
    monkeypatch.setattr(served_span, "kv_format", lambda precision, layout: "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Replays that hops were asked for: of keys and values (True), and of states."""
    counted: Counter[bool] = Counter()
    send = HopSession.send

    async def count(hop: HopSession, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        if isinstance(message, ReplayRequest):
            counted[message.kv] += 1
        await send(hop, message, tensors)

    monkeypatch.setattr(HopSession, "send", count)
    return counted


@pytest.mark.parametrize("way", ["kv", "states", "through the client"])
@pytest.mark.parametrize("leaving", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
async def test_one_or_several_leave_at_once(
    folder: Path,
    leaving: tuple[int, ...],
    way: str,
    asked: Counter[bool],
    request: pytest.FixtureRequest,
) -> None:
    if way == "states":
        request.getfixturevalue("no_kv")
    is_ring = way != "through the client"
    async with story_in(folder, *SPANS, *SPANS, use_server_to_server=is_ring) as story:
        await story.prefill()
        before = story.peers
        await decode_until(story, [story.swarm.stop(before[index]) for index in leaving])
        assert not {before[index] for index in leaving} & set(story.peers)
        assert set(reasons(story)) == {LEAVES}
        if way == "kv":
            assert asked[True] >= len(leaving) and not asked[False]
        else:
            assert not asked[True]
        await story.reorder()
        await story.decode()


async def test_one_hop_is_handed_over_to_two(folder: Path) -> None:
    async with story_in(folder, SPANS[0], BlockSpan(2, 5), *SPANS[1:]) as story:
        await story.prefill()
        assert len(story.peers) == 2
        await decode_until(story, [story.swarm.stop(story.peers[1])])
        assert len(story.peers) == 3
        await story.reorder()
        await story.decode()


async def test_nobody_takes_over(folder: Path) -> None:
    async with story_in(folder, *SPANS, drain_seconds=1.0) as story:
        await story.prefill()
        victim = story.peers[1]
        left = story.swarm.stop(victim)
        for seed in (30, 40, 50):
            await story.decode(seed)
        assert not left.done()
        assert story.peers[1] == victim
        await left
        waiting = asyncio.create_task(story.decode())
        await story.swarm.add(SPANS[1])
        await waiting
        (reason,) = reasons(story)
        assert "stopped" in reason
        await story.reorder()


@pytest.mark.usefixtures("no_kv")
async def test_a_successor_that_cannot_be_handed_to_is_filled_through_us(folder: Path) -> None:
    async with story_in(folder, *SPANS, SPANS[1]) as story:
        await story.prefill()
        first, victim, _ = story.peers
        spare = next(p for p in story.swarm.peers if p not in story.peers)
        story.swarm.net.cut(first, spare)
        await decode_until(story, [story.swarm.stop(victim)])
        assert story.peers[1] == spare
        assert reasons(story) == [LEAVES]
        await story.reorder()


async def test_kv_that_does_not_get_through_is_computed(folder: Path, asked: Counter[bool]) -> None:
    async with story_in(folder, *SPANS, SPANS[1]) as story:
        await story.prefill()
        _, victim, _ = story.peers
        spare = next(p for p in story.swarm.peers if p not in story.peers)
        story.swarm.net.cut(victim, spare)
        await decode_until(story, [story.swarm.stop(victim)])
        assert story.peers[1] == spare
        assert reasons(story) == [LEAVES]
        assert asked[True] == 1 and asked[False]
        await story.reorder()


async def test_kv_that_would_take_too_long_is_computed(folder: Path, asked: Counter[bool]) -> None:
    async with story_in(folder, *SPANS, *SPANS, migration_bytes_per_second=1.0) as story:
        await story.prefill()
        victim = story.peers[1]
        await decode_until(story, [story.swarm.stop(victim)])
        assert victim not in story.peers
        assert reasons(story) == [LEAVES]
        assert asked[False] and not asked[True]


async def test_what_was_put_out_and_dropped_is_not_needed(
    folder: Path, asked: Counter[bool]
) -> None:
    async with story_in(folder, *SPANS, *SPANS, outbox_bytes=64) as story:
        await story.prefill()
        victim = story.peers[1]
        await decode_until(story, [story.swarm.stop(victim)])
        assert victim not in story.peers
        assert reasons(story) == [LEAVES] and not asked[False]
        await story.reorder()


async def test_closing_the_connection_ends_the_migration(folder: Path) -> None:
    async with story_in(folder, *SPANS) as story:
        await story.prefill()
        async with logged("migration has to wait", "petals.client.session.replacement"):
            story.swarm.stop(story.peers[1])
        assert "migrating a session" in {task.get_name() for task in asyncio.all_tasks()}
        await story.access.close()
        assert "migrating a session" not in {task.get_name() for task in asyncio.all_tasks()}
        with pytest.raises(SessionClosed):
            await story.decode()
