"""A whole tiny model here, and the same with its blocks on real servers of this process."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.client.connection.event_loop import client_loop
from petals.client.model.auto import AutoDistributedModelForCausalLM
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.server.config import ComputeConfig, LimitsConfig, MemoryConfig, ServerConfig
from petals.server.config import SourceConfig as Source
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, PeerId
from support.fake_server import config


@dataclass
class ModelSwarm:
    """``peers[i]`` serves the i-th of the spans; ``base`` is what servers are made from."""

    net: MemoryNet
    base: ServerConfig
    local: PreTrainedModel
    stack: AsyncExitStack
    clients: ExitStack
    node: SwarmNode | None = None
    peers: list[PeerId] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)

    def client(self, tuning: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
        """One more client's model; closed with the swarm. ``options`` are its ClientConfig's."""
        remote = AutoDistributedModelForCausalLM.from_pretrained(
            self.base.source.model, dtype=self.local.dtype, **(tuning or {})
        )
        blocks = remote.remote_blocks
        options = {"dht_prefix": blocks.sequence_manager.model} | options
        manager = RemoteSequenceManager(config(**options), blocks.blocks, node=self.node)
        self.clients.enter_context(manager)
        blocks.sequence_manager = manager
        return remote

    def add(self, span: BlockSpan, **changes: Any) -> PeerId:
        """Start one more server and return when it is online."""
        return client_loop.run(self._add(replace(self.base, blocks=span, **changes)))

    async def _add(self, server_config: ServerConfig) -> PeerId:
        came: asyncio.Future[OnlineInfo] = asyncio.get_running_loop().create_future()
        server = Server(server_config, Watchers(on_online=came.set_result), engine=self.net.engine)
        task = asyncio.create_task(server.run())
        await asyncio.wait({task, came}, return_when=asyncio.FIRST_COMPLETED)
        assert came.done(), task.exception()

        async def end_it() -> None:
            server.stop()
            await task

        self.stack.push_async_callback(end_it)
        self.servers.append(server)
        self.peers.append(came.result().peer_id)
        return self.peers[-1]


@contextmanager
def model_swarm(folder: Path, *spans: BlockSpan, dtype: str = "float32") -> Iterator[ModelSwarm]:
    """Servers of the model in ``folder``, one for each span, with a node for clients."""
    stack, clients, net = AsyncExitStack(), ExitStack(), MemoryNet()
    try:
        seed = SwarmNode(NodeConfig(), engine=net.engine)
        client_loop.run(stack.enter_async_context(seed))
        peers = client_loop.run(seed.addresses())
        base = ServerConfig(
            source=Source(model=str(folder)),
            compute=ComputeConfig(device="cpu", num_threads=1, dtype=dtype),
            memory=MemoryConfig(cache_tokens=1024),
            limits=LimitsConfig(max_length=64),
            network=NodeConfig(initial_peers=peers),
        )
        local = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        swarm = ModelSwarm(net, base, local.eval().requires_grad_(False), stack, clients)
        for span in spans:
            swarm.add(span)
        network = NodeConfig(initial_peers=peers, client_mode=True)
        swarm.node = SwarmNode(network, engine=net.engine)
        client_loop.run(stack.enter_async_context(swarm.node))
        yield swarm
    finally:
        clients.close()
        client_loop.run(stack.aclose())
