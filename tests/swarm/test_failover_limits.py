"""What is kept for repairs is bounded: outboxes, leases, the client's own inputs."""

import asyncio
from pathlib import Path

import pytest

from petals.errors import RouteError
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.tiny_models import write_tiny_model
from petals.wire.replies import Info
from petals.wire.requests import GetInfo
from support.session_script import IMPATIENT, SPANS, Story, is_rebuilt, story_in
from support.swarm import HIDDEN, RealSwarm, real_swarm

TOKEN_BYTES = HIDDEN * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


@pytest.mark.parametrize("is_ring", [True, False])
async def test_a_dropped_outbox_is_made_up_for_by_the_client(folder: Path, is_ring: bool) -> None:
    """The predecessor has no room for 32 tokens: everything runs again from the client's inputs."""
    servers = {"outbox_bytes": 20 * TOKEN_BYTES}
    async with story_in(
        folder, *SPANS, *SPANS, servers=servers, use_server_to_server=is_ring
    ) as story:
        await story.prefill()
        story.swarm.net.kill(story.peers[1])
        await story.reorder()
        assert is_rebuilt(story.session)
        await story.decode()


async def info(asker: SwarmNode, swarm: RealSwarm) -> list[Info]:
    found = []
    for peer in swarm.peers:
        async with await asker.open_channel(peer, "blocks") as channel:
            found.append((await channel.request(GetInfo(), expect=Info, timeout=5.0))[0])
    return found


async def test_a_client_that_is_away_keeps_its_sessions_for_the_lease(folder: Path) -> None:
    async with story_in(folder, *SPANS, servers={"lease_seconds": 2.0}) as story:
        swarm = story.swarm
        peers = swarm.server_config.network.initial_peers
        initial = NodeConfig(initial_peers=peers, client_mode=True)
        async with SwarmNode(initial, engine=swarm.net.engine) as other:
            free = [each.tokens_free for each in await info(other, swarm)]
            await story.prefill()
            for peer in swarm.peers:
                swarm.net.cut(swarm.node.peer_id, peer)
            held = await info(other, swarm)
            assert [each.num_sessions for each in held] == [1, 1, 1]
            async with asyncio.timeout(30):
                while any(each.num_sessions for each in held):
                    await asyncio.sleep(0.1)
                    held = await info(other, swarm)
            assert [each.tokens_free for each in held] == free
            for peer in swarm.peers:
                swarm.net.heal(swarm.node.peer_id, peer)
            await story.reorder()
            await story.decode()


async def test_inputs_that_do_not_fit_are_not_kept_and_it_is_said_when_they_lack(
    folder: Path,
) -> None:
    async with story_in(folder, *SPANS, *SPANS, max_kept_bytes=40 * TOKEN_BYTES) as story:
        await story.prefill()
        await story.decode()
        for _ in range(6):  # 32 + 2 + 12 tokens
            await story.decode()
        first, second, _ = story.peers
        story.swarm.net.kill(second)  # the first hop refills its neighbour all the same
        await story.decode()
        assert story.repaired == [second]
        story.swarm.net.kill(first)
        with pytest.raises(RouteError, match="max_kept_bytes"):
            await story.decode()


async def test_the_oldest_session_is_kept_no_more_and_again_once_it_begins_anew(
    folder: Path,
) -> None:
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        access = swarm.connection(**IMPATIENT, max_kept_bytes=40 * TOKEN_BYTES)
        old, young = (Story.begin(swarm, access) for _ in range(2))
        await old.prefill()
        await young.prefill()  # does not fit beside the other
        swarm.net.kill(young.peers[0])
        await young.decode()
        assert len(young.repaired) == 1
        await young.session.close()
        await old.step([0, 0], [row[:3] for row in old.rows])
        assert len(old.repaired) == 1
        await old.decode()
        await old.session.close()
        await access.close()
