"""Two nodes of a swarm in memory, on a clock that the test moves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from petals.swarm.config import ChannelLimits, NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.manual_clock import ManualClock
from petals.testing.memory_net import MemoryNet, MemoryStream

Connect = Callable[[], Awaitable[tuple[MemoryStream, MemoryStream]]]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def net(clock: ManualClock) -> MemoryNet:
    return MemoryNet(clock)


@pytest.fixture
async def server(net: MemoryNet, clock: ManualClock) -> AsyncIterator[SwarmNode]:
    limits = ChannelLimits(max_streams_per_peer=4)
    async with SwarmNode(NodeConfig(limits=limits), engine=net.engine, clock=clock) as node:
        yield node


@pytest.fixture
async def client(net: MemoryNet, clock: ManualClock, server: SwarmNode) -> AsyncIterator[SwarmNode]:
    config = NodeConfig(initial_peers=await server.addresses())
    async with SwarmNode(config, engine=net.engine, clock=clock) as node:
        yield node


@pytest.fixture
def connect(server: SwarmNode, client: SwarmNode) -> Connect:
    """``await connect()`` -> the client's and the server's end of a stream without a greeting."""

    async def ends() -> tuple[MemoryStream, MemoryStream]:
        arrived: asyncio.Queue[MemoryStream] = asyncio.Queue()
        await server.transport.serve("/test", arrived.put)
        ours = await client.transport.open_stream(server.peer_id, "/test", 1.0)
        return ours, await arrived.get()

    return ends
