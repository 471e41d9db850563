"""Clients of one swarm share a node of the real engine; wrong addresses and keys are refused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import pytest

from petals.client.config import ClientConfig
from petals.client.connection.nodes import NodePool
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.errors import AdmissionDenied, BootstrapFailed, ConfigError, MissingBlocksError
from petals.swarm.config import NodeConfig
from petals.swarm.identity import create_swarm_key
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan
from support.models import part_of_model
from support.reference import states
from support.service import Worker, WorkerOptions, running
from support.talk import MODEL

BLOCKS = BlockSpan(0, 2)
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
    again = await pool.acquire(config)
    assert again is not one
    await pool.release(again)


@asynccontextmanager
async def serving(node: SwarmNode) -> AsyncIterator[Worker]:
    """A server of two blocks on a node."""
    span = part_of_model("llama", BLOCKS, BLOCKS)
    async with running(node, span, WorkerOptions()) as worker:
        await worker.announce()
        yield worker


async def open_one(access: SwarmConnection) -> SessionRows:
    session = SessionRows(access, BLOCKS, max_length=20)
    await session.step(states(1), (0,), (1,))
    return session


async def test_a_session_over_real_streams(seed: SwarmNode) -> None:
    config = ClientConfig(initial_peers=await seed.addresses())
    async with serving(seed) as server:
        access = SwarmConnection(config, MODEL, 2)
        session = await open_one(access)
        assert len(server.service.sessions) == 1
        await access.close()
        await server.at_rest()
        await session.close()
    nobody, began = SwarmConnection(config, "nobody", 2), monotonic()
    with pytest.raises(MissingBlocksError, match="0:2 of nobody"):
        await open_one(nobody)
    assert monotonic() - began < 5
    await nobody.close()


async def test_an_unreachable_bootstrap_is_said_within_seconds() -> None:
    pool, began = NodePool(), monotonic()
    with pytest.raises(BootstrapFailed) as caught:
        await pool.acquire(ClientConfig(initial_peers=[NOBODY]))
    assert caught.value.hint
    assert monotonic() - began < 6


async def test_the_swarm_key_opens_a_private_swarm(tmp_path: Path) -> None:
    key = create_swarm_key(tmp_path / "swarm.key")
    (tmp_path / "other.key").write_text(SwarmKey.generate().format())
    async with (
        SwarmNode(NodeConfig(host="127.0.0.1", swarm_key=key)) as seed,
        serving(seed),
    ):
        peers = (await seed.addresses())[:1]
        config = ClientConfig(initial_peers=peers, swarm_key=tmp_path / "swarm.key")
        access = SwarmConnection(config, MODEL, 2)
        await open_one(access)
        await access.close()
        wrong = ClientConfig(initial_peers=peers, swarm_key=tmp_path / "other.key", max_retries=0)
        access = SwarmConnection(wrong, MODEL, 2)
        with pytest.raises(AdmissionDenied):
            await open_one(access)
        await access.close()


async def test_a_key_file_that_is_missing(tmp_path: Path) -> None:
    config = ClientConfig(initial_peers=[NOBODY], swarm_key=tmp_path / "none")
    with pytest.raises(ConfigError, match="swarm key"):
        await NodePool().acquire(config)
