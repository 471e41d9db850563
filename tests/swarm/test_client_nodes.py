"""Clients of one swarm share a node of the real engine; wrong addresses and keys are refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import pytest

from petals.client.config import ClientConfig
from petals.client.connection.nodes import NodePool
from petals.client.routing.sequence_manager import SwarmConnection
from petals.errors import AdmissionDenied, BootstrapFailed, ConfigError, MissingBlocksError
from petals.swarm.config import NodeConfig
from petals.swarm.identity import create_swarm_key
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan
from support.fake_server import ToyServer, open_one

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKjS9yJsQwDbD5oCqgKcKqEYvuQVvzJ3nSSBDeJXNbXhr"


@pytest.fixture
async def seed() -> AsyncIterator[SwarmNode]:
    async with SwarmNode(NodeConfig(host="127.0.0.1")) as node:
        yield node


async def test_one_node_for_all_who_mean_the_same_swarm(seed: SwarmNode) -> None:
    pool, config = NodePool(), ClientConfig(initial_peers=await seed.addresses())
    one, other = await asyncio.gather(pool.acquire(config), pool.acquire(config))
    assert one is other
    await pool.release(one)
    assert await one.ping(seed.peer_id) > 0
    await pool.release(other)
    assert not pool._nodes
    again = await pool.acquire(config)
    assert again is not one
    await pool.release(again)


async def test_a_session_over_real_streams(seed: SwarmNode) -> None:
    server = ToyServer(seed, BlockSpan(0, 2))
    seed.serve("blocks", server.serve)
    await server.announce()
    config = ClientConfig(initial_peers=await seed.addresses())
    access = SwarmConnection(config, "toy", 2)
    session = await open_one(access, BlockSpan(0, 2))
    assert server.sessions
    await access.close()
    assert not server.sessions
    nobody = SwarmConnection(config, "nobody", 2)
    began = monotonic()
    with pytest.raises(MissingBlocksError, match="0:2 of nobody"):
        await open_one(nobody, BlockSpan(0, 2))
    assert monotonic() - began < 5
    await nobody.close()
    await session.close()


async def test_an_unreachable_bootstrap_is_said_within_seconds() -> None:
    pool, began = NodePool(), monotonic()
    with pytest.raises(BootstrapFailed) as caught:
        await pool.acquire(ClientConfig(initial_peers=[NOBODY]))
    assert caught.value.hint
    assert monotonic() - began < 6
    assert not pool._nodes


async def test_the_swarm_key_opens_a_private_swarm(tmp_path: Path) -> None:
    key = create_swarm_key(tmp_path / "swarm.key")
    async with SwarmNode(NodeConfig(host="127.0.0.1", swarm_key=key)) as seed:
        server = ToyServer(seed, BlockSpan(0, 2))
        seed.serve("blocks", server.serve)
        await server.announce()
        peers = (await seed.addresses())[:1]
        config = ClientConfig(initial_peers=peers, swarm_key=tmp_path / "swarm.key")
        access = SwarmConnection(config, "toy", 2)
        await open_one(access, BlockSpan(0, 2))
        await access.close()
        (tmp_path / "other.key").write_text(SwarmKey.generate().format())
        wrong = ClientConfig(initial_peers=peers, swarm_key=tmp_path / "other.key", max_retries=0)
        access = SwarmConnection(wrong, "toy", 2)
        with pytest.raises(AdmissionDenied):
            await open_one(access, BlockSpan(0, 2))
        await access.close()


async def test_a_key_file_that_is_missing(tmp_path: Path) -> None:
    config = ClientConfig(initial_peers=[NOBODY], swarm_key=tmp_path / "none")
    with pytest.raises(ConfigError, match="swarm key"):
        await NodePool().acquire(config)
