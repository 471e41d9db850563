"""Forks of sessions: what a server refuses, and what both copies survive."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from petals.errors import CacheFull, LengthExceeded, NoCapacity, RouteError, SessionClosed
from petals.server.config import ClientLimits
from petals.testing.tiny_models import write_tiny_model
from petals.types import ServerState
from support.reference import assert_close, states
from support.service import served
from support.session_script import SPANS, Story, story_in
from support.swarm import HIDDEN
from support.talk import Talk

TOKEN_BYTES = HIDDEN * 4
ROOMY = {"cache_tokens": 4096}
SMALL = {"cache_tokens": 150}
"""Room for one session of 2 x 60 tokens."""


@pytest.fixture(scope="module", params=["bloom", "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(parent, request.param, num_hidden_layers=5)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


@asynccontextmanager
async def forked(story: Story, max_length: int | None = None) -> AsyncIterator[Story]:
    """The same story, told by a fork of its session."""
    session = await story.session.fork(max_length)
    try:
        yield Story(story.swarm, story.access, session, list(story.rows))
    finally:
        await session.close()


def copied(story: Story) -> bool:
    """Whether the session began with rows that servers had copied: it has run nothing yet."""
    return not any(hop.steps for hop in story.session.trace.hops)


class TestAtAServer:
    @pytest.mark.parametrize("model", ["llama", "bloom", "qwen3_next"])
    @pytest.mark.parametrize("max_length", [0, 20, 64])
    async def test_both_go_on_from_the_same_rows(self, model: str, max_length: int) -> None:
        async with served(model) as swarm:
            talk, text, other = await swarm.talk(), states(12), states(3, seed=9)
            await talk.open(rows=2)
            await talk.step(0, [0, 0], [text[:9], text[:5]])
            fork = Talk(talk.channel, talk.blocks, swarm.new_id())
            asked = {"fork_of": talk.session_id, "fork_lengths": (9, 4)}
            for _ in range(2):  # the same request is answered again
                await fork.open(rows=2, max_length=max_length, **asked)
            ours = await talk.step(1, [9, 5], [text[9:], text[5:6]])
            theirs = await fork.step(0, [9, 4], [other, text[4:6]])
            assert_close(ours[0], swarm.expected(text)[9:])
            assert_close(ours[1], swarm.expected(text[:6])[5:])
            assert_close(theirs[0], swarm.expected(torch.cat([text[:9], other]))[9:])
            assert_close(theirs[1], swarm.expected(text[:6])[4:])
            _, twin = swarm.service.sessions
            chunks = twin.rows.outputs.read((0, 0), (12, 6))
            kept = torch.cat([chunk.hidden for chunk in chunks])
            whole = [torch.cat([text[:9], other]), text[:6]]
            assert_close(kept, torch.cat([swarm.expected(row) for row in whole]))

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"fork_of": b"x" * 16}, "session_closed"),
            ({"blocks": (10, 12)}, "bad_input"),
            ({"dtype": "bfloat16"}, "bad_input"),
            ({"rows": 2}, "bad_input"),
            ({"rows": 2, "fork_lengths": (1, 1)}, "session_gap"),
            ({"fork_lengths": (10,)}, "session_gap"),
            ({"max_length": 8}, "length_exceeded"),
        ],
        ids=str,
    )
    async def test_refusals_hold_nothing(self, changes: dict[str, object], code: str) -> None:
        async with served() as swarm:
            talk, text = await swarm.talk(), states(10)
            await talk.open()
            await talk.step(0, [0], [text[:9]])
            fork = Talk(talk.channel, talk.blocks, swarm.new_id())
            asked = {"fork_of": talk.session_id, "fork_lengths": (9,)} | changes
            assert (await fork.refused(fork.opening(**asked))).code == code
            assert len(swarm.service.sessions) == 1
            (output,) = await talk.step(1, [9], [text[9:]])
            assert_close(output, swarm.expected(text)[9:])

    async def test_a_session_of_another_client_is_unknown(self) -> None:
        async with served() as swarm:
            talk, stranger = await swarm.talk(), await swarm.talk(swarm.stranger)
            await talk.open()
            await talk.step(0, [0], [states(3)])
            asked = {"fork_of": talk.session_id, "fork_lengths": (3,)}
            assert (await stranger.refused(stranger.opening(**asked))).code == "session_closed"

    async def test_a_fork_counts_like_any_session(self) -> None:
        async with served(num_tokens=96, door=ClientLimits(max_sessions_per_peer=2)) as swarm:
            talk = await swarm.talk()
            await talk.open(max_length=48)
            await talk.step(0, [0], [states(3)])
            fork, third = [Talk(talk.channel, talk.blocks, swarm.new_id()) for _ in range(2)]
            asked = {"fork_of": talk.session_id, "fork_lengths": (3,)}
            assert (await fork.refused(fork.opening(max_length=64, **asked))).code == "cache_full"
            await fork.open(max_length=48, **asked)
            assert (await third.refused(third.opening(max_length=3, **asked))).code == "peer_busy"
            pool = swarm.workers[0].pool
            assert pool.reserved_bytes == pool.budget_bytes

    async def test_a_server_that_leaves_takes_no_fork(self) -> None:
        async with served() as swarm:
            talk = await swarm.talk()
            await talk.open()
            await talk.step(0, [0], [states(3)])
            swarm.service.state = ServerState.DRAINING
            fork = Talk(talk.channel, talk.blocks, swarm.new_id())
            asked = {"fork_of": talk.session_id, "fork_lengths": (3,)}
            assert (await fork.refused(fork.opening(**asked))).code == "peer_busy"


@pytest.mark.parametrize("is_ring", [True, False], ids=["ring", "star"])
class TestASession:
    async def test_both_go_on_alone(self, folder: Path, is_ring: bool) -> None:
        async with story_in(folder, *SPANS, servers=ROOMY, use_server_to_server=is_ring) as story:
            await story.prefill()
            await story.decode()
            async with forked(story) as fork:
                assert copied(fork)
                await fork.rollback()
                await story.reorder()
                await fork.reorder()
                await story.decode()
                await fork.decode()
            await story.decode()

    @pytest.mark.parametrize("index", [0, 1, 2])
    async def test_both_survive_a_death(self, folder: Path, is_ring: bool, index: int) -> None:
        async with story_in(
            folder, *SPANS, *SPANS, servers=ROOMY, use_server_to_server=is_ring
        ) as story:
            await story.prefill()
            async with forked(story) as fork:
                assert copied(fork)
                await fork.decode()
                assert fork.peers == story.peers
                victim = story.peers[index]
                story.swarm.net.kill(victim)
                for one in (fork, story):
                    await one.reorder()
                    await one.decode()
                    assert one.repaired == [victim]

    async def test_a_dead_server_is_replaced(self, folder: Path, is_ring: bool) -> None:
        async with story_in(
            folder, *SPANS, *SPANS, servers=ROOMY, use_server_to_server=is_ring
        ) as story:
            await story.prefill()
            story.swarm.net.kill(story.peers[1])
            async with forked(story) as fork:
                await fork.rollback()
                await story.decode()


async def test_what_the_next_step_is_to_bring_is_in_the_fork(folder: Path) -> None:
    """Rows that were cut or reordered by a step without tokens are so for both copies."""
    async with story_in(folder, *SPANS, servers=ROOMY) as story:
        await story.prefill()
        await story.step([4, 20, 9], [states(0)] * 3, reorder=(1, 0, 1))
        async with forked(story) as fork:
            await fork.decode()
            await story.decode(31)


async def test_before_the_first_step(folder: Path) -> None:
    async with story_in(folder, *SPANS, servers=ROOMY) as story, forked(story) as fork:
        await fork.prefill()
        await story.prefill()


async def test_a_longer_fork(folder: Path) -> None:
    async with story_in(folder, *SPANS, servers=ROOMY) as story:
        short = Story.begin(story.swarm, story.access, max_length=24)
        await short.prefill()
        with pytest.raises(LengthExceeded, match="23 tokens"):
            await short.session.fork(22)
        async with forked(short, 40) as fork:
            assert (fork.session.max_length, short.session.max_length) == (40, 24)
            for seed in range(5):
                await fork.decode(seed)
        await short.session.close()


class TestNoRoom:
    async def test_other_servers_are_filled_from_what_the_client_has_sent(
        self, bloom: Path
    ) -> None:
        async with story_in(bloom, *SPANS, *SPANS, servers=SMALL) as story:
            await story.prefill()
            async with forked(story) as fork:
                assert not set(fork.peers) & set(story.peers)
                await fork.rollback()
                await story.decode()

    async def test_nowhere(self, bloom: Path) -> None:
        async with story_in(bloom, *SPANS, servers=SMALL, alloc_timeout=0.1) as story:
            await story.prefill()
            with pytest.raises((NoCapacity, CacheFull)):
                await story.session.fork()
            await story.decode()

    async def test_inputs_that_were_not_kept(self, bloom: Path) -> None:
        options = {"servers": SMALL, "max_kept_bytes": 20 * TOKEN_BYTES}
        async with story_in(bloom, *SPANS, *SPANS, **options) as story:
            await story.prefill()
            with pytest.raises(RouteError, match="max_kept_bytes"):
                await story.session.fork()
            await story.decode()


async def test_inputs_that_were_not_kept_are_not_needed(folder: Path) -> None:
    async with story_in(folder, *SPANS, servers=ROOMY, max_kept_bytes=20 * TOKEN_BYTES) as story:
        await story.prefill()
        async with forked(story) as fork:
            await fork.rollback()
            await story.decode()


async def test_a_closed_session(folder: Path) -> None:
    async with story_in(folder, *SPANS, servers=ROOMY) as story:
        await story.prefill()
        await story.session.close()
        with pytest.raises(SessionClosed):
            await story.session.fork()
