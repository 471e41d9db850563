"""A swarm of real servers of a tiny model, in one process, over a network in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from petals.client.routing.sequence_manager import SwarmConnection
from petals.models.loading.split import load_blocks
from petals.models.runtime.span import Span
from petals.server.config import (
    ClientLimits,
    ComputeConfig,
    LimitsConfig,
    MemoryConfig,
    ServerConfig,
)
from petals.server.config import SourceConfig as Source
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, PeerId
from support.fake_server import config

NUM_BLOCKS = 5
ALL = BlockSpan(0, NUM_BLOCKS)
HIDDEN = 32


@dataclass
class RealSwarm:
    """``peers[i]`` serves the i-th of the spans; ``base`` is what servers are made from."""

    net: MemoryNet
    base: ServerConfig
    local: Span
    model: str = ""
    client: SwarmNode | None = None
    peers: list[PeerId] = field(default_factory=list)
    running: list[tuple[Server, "asyncio.Task[None]"]] = field(default_factory=list)

    def access(self, **options: object) -> SwarmConnection:
        return SwarmConnection(config(**options), self.model, NUM_BLOCKS, self.client)

    def expected(self, row: torch.Tensor) -> torch.Tensor:
        return self.local.reference(row)

    def stop(self, peer: PeerId) -> "asyncio.Task[None]":
        """Ask a server to leave; what is returned ends when it has left."""
        self.running[self.peers.index(peer)][0].stop()
        return self.stopped(peer)

    def stopped(self, peer: PeerId) -> "asyncio.Task[None]":
        """The life of a server."""
        return self.running[self.peers.index(peer)][1]

    async def add(self, span: BlockSpan) -> PeerId:
        """Start one more server and return when it is online."""
        came: asyncio.Future[OnlineInfo] = asyncio.get_running_loop().create_future()
        server = Server(
            replace(self.base, blocks=span),
            Watchers(on_online=came.set_result),
            engine=self.net.engine,
        )
        task = asyncio.create_task(server.run())
        self.running.append((server, task))
        await asyncio.wait({task, came}, return_when=asyncio.FIRST_COMPLETED)
        self.model = came.result().model
        self.peers.append(came.result().peer_id)
        return self.peers[-1]


def states(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def real_swarm(
    folder: Path,
    *spans: BlockSpan,
    cache_tokens: int = 512,
    outbox_bytes: int | None = None,
    lease_seconds: float = 60.0,
    drain_seconds: float = 60.0,
    max_step_tokens: int = 16,
    adapters: tuple[str, ...] = (),
    **failover: object,
) -> AsyncIterator[RealSwarm]:
    """Servers of these spans; ``failover``: options of their FailoverConfig."""
    net = MemoryNet()
    async with SwarmNode(NodeConfig(), engine=net.engine) as seed:
        initial_peers = await seed.addresses()
        base = ServerConfig(
            source=Source(model=str(folder), adapters=adapters),
            compute=ComputeConfig(device="cpu", num_threads=1),
            memory=MemoryConfig(
                cache_tokens=cache_tokens, outbox_bytes=outbox_bytes, check_integrity=True
            ),
            limits=LimitsConfig(max_length=64, max_step_tokens=max_step_tokens),
            clients=ClientLimits(replay_chunk_tokens=16, lease_seconds=lease_seconds),
            network=NodeConfig(initial_peers=initial_peers),
            failover=FailoverConfig(**failover),
            drain_seconds=drain_seconds,
        )
        swarm = RealSwarm(net, base, Span(load_blocks(str(folder), ALL)))
        for span in spans:
            await swarm.add(span)
        network = NodeConfig(initial_peers=initial_peers, client_mode=True)
        async with SwarmNode(network, engine=net.engine) as swarm.client:
            yield swarm
        for server, _ in swarm.running:
            server.stop()
            server.stop()
        await asyncio.gather(*(task for _, task in swarm.running))
