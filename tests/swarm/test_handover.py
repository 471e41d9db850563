"""Servers leave politely in the middle of sessions: nobody notices, nothing is lost."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from petals.client.session import migration
from petals.client.session.hop import HopSession
from petals.client.session.rows import SessionRows
from petals.client.session.types import SessionSpec
from petals.server.lifecycle import served_span
from petals.testing.manual_clock import settle
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId
from support.session_script import IMPATIENT, SPANS, STATE_BYTES, Fault, Story
from support.swarm import ALL, HIDDEN, RealSwarm, real_swarm, states

LEAVES = "The server leaves."
PATIENT = IMPATIENT | {"silence_timeout": 10.0, "repair_timeout": 20.0}
"""Nobody falls silent here, and the loop that all share may be held up."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


@asynccontextmanager
async def story_in(
    folder: Path,
    *spans: BlockSpan,
    drain_seconds: float = 60.0,
    outbox_bytes: int | None = None,
    **options: object,
) -> AsyncIterator[Story]:
    """A session that is open and has not begun."""
    server = {"drain_seconds": drain_seconds, "outbox_bytes": outbox_bytes}
    async with real_swarm(folder, *spans, **server) as swarm:
        access = swarm.access(**(PATIENT | options))
        session = SessionRows(access, ALL, max_length=60)
        await session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))
        yield Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await session.close()
        await access.close()


def peers(story: Story) -> list[PeerId]:
    return [hop.peer_id for hop in story.session.trace.hops]


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
        victim = peers(story)[index]
        event = Fault(story.swarm, victim, "drain", "asked")
        await story.tell(phase, event.arm)
        assert event.happened.is_set()
        await decode_until(story, [story.swarm.stopped(victim)])
        assert victim not in peers(story)
        assert reasons(story) == [LEAVES]
        await story.reorder()
        await story.decode()


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_session_that_rests_is_handed_over_too(folder: Path, index: int) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        await story.reorder()
        victim = peers(story)[index]
        await story.swarm.stop(victim)
        assert victim not in peers(story)
        await story.decode()
        assert reasons(story) == [LEAVES]


async def test_a_session_that_has_not_begun_moves_at_once(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        victim = peers(story)[1]
        await story.swarm.stop(victim)
        assert victim not in peers(story)
        await story.prefill()
        await story.decode()


@pytest.mark.parametrize("index", [0, 1])
async def test_every_step_reorders_the_rows(folder: Path, index: int) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        left = story.swarm.stop(peers(story)[index])
        order, seed = (1, 0), 50
        while not left.done():
            at = [min(len(story.rows[row]), 40) for row in order]
            await story.step(at, [states(1, seed), states(1, seed + 1)], reorder=order)
            order, seed = ((0, 0), (1, 1), (1, 0))[seed % 3], seed + 2
        await left
        await story.decode()
        assert reasons(story) == [LEAVES]


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that cannot go on with each other's pages, as if they ran in several precisions."""
    monkeypatch.setattr(served_span, "kv_format", lambda precision, layout: "")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Replays that hops were asked for: of pages, and of what was put out."""
    asked: Counter[bool] = Counter()
    replay = HopSession.replay

    async def count(hop: HopSession, *args: object, pages: bool = False, **more: object) -> None:
        asked[pages] += 1
        await replay(hop, *args, pages=pages, **more)

    monkeypatch.setattr(HopSession, "replay", count)
    return asked


@pytest.mark.parametrize("way", ["pages", "handed on", "come through us"])
@pytest.mark.parametrize("leaving", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
async def test_one_or_several_leave_at_once(
    folder: Path,
    leaving: tuple[int, ...],
    way: str,
    given: Counter[bool],
    request: pytest.FixtureRequest,
) -> None:
    if way == "handed on":
        request.getfixturevalue("no_pages")
    is_ring = way != "come through us"
    async with story_in(folder, *SPANS, *SPANS, use_server_to_server=is_ring) as story:
        await story.prefill()
        before = peers(story)
        await decode_until(story, [story.swarm.stop(before[index]) for index in leaving])
        assert not {before[index] for index in leaving} & set(peers(story))
        assert set(reasons(story)) == {LEAVES}
        if way == "pages":
            assert given[True] >= len(leaving) and not given[False]
        else:
            assert not given[True]
        await story.reorder()
        await story.decode()


async def test_one_hop_is_handed_over_to_two(folder: Path) -> None:
    async with story_in(folder, SPANS[0], BlockSpan(2, 5), *SPANS[1:]) as story:
        await story.prefill()
        assert len(peers(story)) == 2
        await decode_until(story, [story.swarm.stop(peers(story)[1])])
        assert len(peers(story)) == 3
        await story.reorder()
        await story.decode()


def kill_when_states_come(swarm: RealSwarm, victims: set[PeerId]) -> asyncio.Event:
    """The first of ``victims`` that is sent states dies of it."""
    died = asyncio.Event()

    def see(source: PeerId, target: PeerId, num_bytes: int) -> None:
        if target in victims and num_bytes > STATE_BYTES and not died.is_set():
            died.set()
            swarm.net.kill(target)

    swarm.net.on_write = see
    return died


@pytest.mark.parametrize("has_pages", [True, False], ids=["pages", "states"])
async def test_the_successor_dies_while_it_is_filled(
    folder: Path, has_pages: bool, request: pytest.FixtureRequest
) -> None:
    if not has_pages:
        request.getfixturevalue("no_pages")
    async with story_in(folder, *SPANS, *SPANS, SPANS[1]) as story:
        await story.prefill()
        swarm = story.swarm
        victim = peers(story)[1]
        spares = {peer for at, peer in enumerate(swarm.peers) if at in (1, 4, 6)} - {victim}
        died = kill_when_states_come(swarm, spares)
        await decode_until(story, [swarm.stop(victim)])
        assert died.is_set()
        assert peers(story)[1] in spares
        assert reasons(story) == [LEAVES]
        await story.reorder()


@pytest.mark.usefixtures("no_pages")
async def test_the_server_before_dies_while_it_fills_the_successor(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        swarm = story.swarm
        first, victim, last = peers(story)
        spares = set(swarm.peers) - {first, victim, last}

        def see(source: PeerId, target: PeerId, num_bytes: int) -> None:
            if source == first and target in spares and num_bytes > STATE_BYTES:
                swarm.net.on_write = lambda source, target, num_bytes: None
                swarm.net.kill(first)

        swarm.net.on_write = see
        await decode_until(story, [swarm.stop(victim)])
        assert not {first, victim} & set(peers(story))
        assert set(reasons(story)) == {"The stream ended.", LEAVES}
        await story.reorder()


async def test_nothing_is_handed_over_within_a_repair(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        recovery = story.session._recovery
        course, epochs, reserve_route = recovery._course, [], migration.reserve_route

        async def count(swarm: object, blocks: object, terms: SessionSpec, *more: object) -> object:
            epochs.append(terms.epoch)
            return await reserve_route(swarm, blocks, terms, *more)

        monkeypatch.setattr(migration, "reserve_route", count)
        async with course.turn:  # as whoever repairs
            victim = course.path.hops[1]
            course.epoch += 1
            victim.leaving_seconds = 60.0
            recovery._handover.look()
            await settle()
            assert not epochs
            await course.path.begin_epoch(course.epoch)
        while not reasons(story):
            await story.decode()
        assert epochs == [1] and reasons(story) == [LEAVES]
        assert victim.peer_id not in peers(story)


async def test_nobody_takes_over(folder: Path) -> None:
    async with story_in(folder, *SPANS, drain_seconds=1.0) as story:
        await story.prefill()
        victim = peers(story)[1]
        left = story.swarm.stop(victim)
        for seed in (30, 40, 50):
            await story.decode(seed)
        assert not left.done()
        assert peers(story)[1] == victim
        await left
        waiting = asyncio.create_task(story.decode())
        await story.swarm.add(SPANS[1])
        await waiting
        (reason,) = reasons(story)
        assert "stopped" in reason
        await story.reorder()


@pytest.mark.usefixtures("no_pages")
async def test_a_successor_that_cannot_be_handed_to_is_filled_through_us(folder: Path) -> None:
    async with story_in(folder, *SPANS, SPANS[1]) as story:
        await story.prefill()
        first, victim, _ = peers(story)
        spare = next(p for p in story.swarm.peers if p not in peers(story))
        story.swarm.net.cut(first, spare)
        await decode_until(story, [story.swarm.stop(victim)])
        assert peers(story)[1] == spare
        assert reasons(story) == [LEAVES]
        await story.reorder()


async def test_the_server_dies_while_it_gives_its_pages(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        swarm = story.swarm
        victim = peers(story)[1]
        spares = set(swarm.peers) - set(peers(story))

        def see(source: PeerId, target: PeerId, num_bytes: int) -> None:
            if source == victim and target in spares and num_bytes > STATE_BYTES:
                swarm.net.on_write = lambda source, target, num_bytes: None
                swarm.net.kill(victim)

        swarm.net.on_write = see
        swarm.stop(victim)
        while not reasons(story):
            await story.decode()
        assert victim not in peers(story)
        assert reasons(story) == ["The stream ended."]
        await story.reorder()


async def test_pages_that_do_not_get_through_are_computed(
    folder: Path, given: Counter[bool]
) -> None:
    async with story_in(folder, *SPANS, SPANS[1]) as story:
        await story.prefill()
        _, victim, _ = peers(story)
        spare = next(p for p in story.swarm.peers if p not in peers(story))
        story.swarm.net.cut(victim, spare)
        await decode_until(story, [story.swarm.stop(victim)])
        assert peers(story)[1] == spare
        assert reasons(story) == [LEAVES]
        assert given[True] == 1 and given[False]
        await story.reorder()


async def test_pages_that_would_take_too_long_are_computed(
    folder: Path, given: Counter[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "_ASSUMED_BYTES_PER_SECOND", 1.0)
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        victim = peers(story)[1]
        await decode_until(story, [story.swarm.stop(victim)])
        assert victim not in peers(story)
        assert reasons(story) == [LEAVES]
        assert given[False] and not given[True]


async def test_what_was_put_out_and_dropped_is_not_needed(
    folder: Path, given: Counter[bool]
) -> None:
    async with story_in(folder, *SPANS, *SPANS, outbox_bytes=64) as story:
        await story.prefill()
        victim = peers(story)[1]
        await decode_until(story, [story.swarm.stop(victim)])
        assert victim not in peers(story)
        assert reasons(story) == [LEAVES] and not given[False]
        await story.reorder()


async def test_many_sessions_leave_the_same_server(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS, cache_tokens=2048) as swarm:
        access = swarm.access(**PATIENT)
        sessions = [SessionRows(access, ALL, max_length=60) for _ in range(4)]
        stories = [Story(swarm, one, [torch.empty(0, HIDDEN)] * 2) for one in sessions]
        await asyncio.gather(*(story.prefill() for story in stories))
        victim = peers(stories[0])[1]
        left = swarm.stop(victim)
        await asyncio.gather(*(decode_until(story, [left]) for story in stories))
        await asyncio.gather(*(story.reorder() for story in stories))
        for story in stories:
            assert victim not in peers(story)
            assert set(reasons(story)) <= {LEAVES}
            await story.session.close()
        await access.close()
