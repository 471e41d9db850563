"""What is kept for repairs is bounded: outboxes, leases, the client's own inputs."""

import asyncio
from pathlib import Path

import pytest
import torch

from petals.client.session.rows import SessionRows
from petals.errors import RouteError
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.tiny_models import write_tiny_model
from petals.wire.replies import Info
from petals.wire.requests import GetInfo
from support.session_script import IMPATIENT, SPANS, Story, session_id
from support.swarm import ALL, HIDDEN, RealSwarm, real_swarm

TOKEN_BYTES = HIDDEN * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


def story_of(swarm: RealSwarm, **options: object) -> Story:
    access = swarm.access(**IMPATIENT, repair_timeout=20.0, **options)
    session = SessionRows(access, ALL, max_length=40)
    return Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)


async def end(story: Story) -> None:
    await story.session.close()
    await story.session._access.close()


@pytest.mark.parametrize("is_ring", [True, False])
async def test_a_dropped_outbox_is_made_up_for_by_the_client(folder: Path, is_ring: bool) -> None:
    """The predecessor has no room for 32 tokens: everything runs again from the client's inputs."""
    async with real_swarm(folder, *SPANS, *SPANS, outbox_bytes=20 * TOKEN_BYTES) as swarm:
        story = story_of(swarm, use_server_to_server=is_ring)
        await story.prefill()
        first, victim, _ = (hop.peer_id for hop in story.session.trace.hops)
        before = session_id(story.session)
        swarm.net.kill(victim)
        await story.reorder()
        assert session_id(story.session) != before
        await story.decode()
        await end(story)


async def info(asker: SwarmNode, swarm: RealSwarm) -> list[Info]:
    found = []
    for peer in swarm.peers:
        async with await asker.open_channel(peer, "blocks") as channel:
            found.append((await channel.request(GetInfo(), expect=Info, timeout=5.0))[0])
    return found


async def test_a_client_that_is_away_keeps_its_sessions_for_the_lease(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, lease_seconds=2.0) as swarm:
        initial = NodeConfig(initial_peers=swarm.base.network.initial_peers, client_mode=True)
        async with SwarmNode(initial, engine=swarm.net.engine) as other:
            free = [each.tokens_free for each in await info(other, swarm)]
            story = story_of(swarm)
            await story.prefill()
            for peer in swarm.peers:
                swarm.net.cut(swarm.client.peer_id, peer)
            held = await info(other, swarm)
            assert [each.num_sessions for each in held] == [1, 1, 1]
            async with asyncio.timeout(30):
                while any(each.num_sessions for each in held):
                    await asyncio.sleep(0.1)
                    held = await info(other, swarm)
            assert [each.tokens_free for each in held] == free
            for peer in swarm.peers:
                swarm.net.heal(swarm.client.peer_id, peer)
            await story.reorder()
            await story.decode()
            await end(story)


async def test_inputs_that_do_not_fit_are_not_kept_and_it_is_said_when_they_lack(
    folder: Path,
) -> None:
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        story = story_of(swarm, max_kept_bytes=40 * TOKEN_BYTES)
        await story.prefill()
        await story.decode()
        for _ in range(6):  # 32 + 2 + 12 tokens
            await story.decode()
        first, second, _ = (hop.peer_id for hop in story.session.trace.hops)
        swarm.net.kill(second)  # the first hop refills its neighbour all the same
        await story.decode()
        assert [repair.peer_id for repair in story.session.trace.repairs] == [second]
        swarm.net.kill(first)
        with pytest.raises(RouteError, match="max_kept_bytes"):
            await story.decode()
        await end(story)


async def test_a_short_session_is_kept_again_once_others_have_gone(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        long, short = (
            Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
            for access in [swarm.access(**IMPATIENT, max_kept_bytes=40 * TOKEN_BYTES)]
            for session in [SessionRows(access, ALL, max_length=40) for _ in range(2)]
        )
        await long.prefill()
        await short.prefill()  # does not fit beside the other
        await long.session.close()
        await short.step([0, 0], [row[:3] for row in short.rows])
        swarm.net.kill(short.session.trace.hops[0].peer_id)
        await short.decode()
        assert len(short.session.trace.repairs) == 1
        await end(short)
