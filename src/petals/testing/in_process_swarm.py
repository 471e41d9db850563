"""A whole swarm in one process: real servers and real clients over a network in memory.

No process, socket or port is opened, so a swarm starts in tens of milliseconds and its faults come
exactly where a test puts them. Knows servers and clients; must not know tensors or messages.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from transformers import PreTrainedModel

from petals.client.config import ClientConfig
from petals.client.connection.event_loop import client_loop
from petals.client.connection.nodes import nodes
from petals.client.model.auto import AutoDistributedModel, AutoDistributedModelForCausalLM
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.server.config import ComputeConfig, ServerConfig, SourceConfig
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, ModelId, PeerId

T = TypeVar("T")


class InProcessSwarm:
    """Servers of one model, one for each of ``spans``, and any number of clients.

    ``server`` is a checkpoint's folder (or repository), or the settings of every server; blocks and
    network are filled in. ``client`` are fields of ClientConfig that all clients get.

    In ordinary code use it as a context manager. The swarm then runs in the event loop of the
    synchronous client, in a thread of its own, and `model` gives models that use it::

        with InProcessSwarm("tiny-llama", BlockSpan(0, 2), BlockSpan(2, 5)) as swarm:
            model = swarm.model()
            with model.inference_session(max_length=32) as session:
                model.generate(prompt, max_new_tokens=4)
                swarm.run(swarm.add(BlockSpan(2, 5)))
                swarm.kill(session.trace.hops[1].peer_id)
                model.generate(None, max_new_tokens=4)  # the session continues on the replica

    Inside an event loop use it as an asynchronous context manager: the swarm then runs in that
    loop, and `session` opens sessions that work on hidden states::

        async with InProcessSwarm("tiny-llama", BlockSpan(0, 5)) as swarm:
            async with swarm.session(max_length=32) as session:
                output = await session.step(hidden, starts=(0,), counts=(3,))

    Only `add` and `session` are coroutines; all other methods may be called from any thread.
    """

    def __init__(
        self,
        server: ServerConfig | str | Path,
        *spans: BlockSpan,
        client: Mapping[str, Any] | None = None,
        net: MemoryNet | None = None,
    ) -> None:
        if not isinstance(server, ServerConfig):
            server = ServerConfig(
                source=SourceConfig(model=str(server)),
                compute=ComputeConfig(device="cpu", num_threads=1),
            )
        self.net = net or MemoryNet()
        self.peers: list[PeerId] = []
        """Servers in the order in which they were started, those that have left included."""
        self.model_id = ModelId("")
        """The model's name in the directory; known once a server is online."""
        self.num_blocks = 0
        """Number of blocks up to the end of the furthest span that was ever served."""
        self._server_config = server
        self._spans = spans
        self._client_options = dict(client or {})
        self._stack = AsyncExitStack()
        self._servers: dict[PeerId, Server] = {}
        self._infos: dict[PeerId, list[OnlineInfo]] = {}
        self._lives: dict[PeerId, asyncio.Task[None]] = {}
        self._aliases = itertools.count()
        self._node: SwarmNode | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- Life

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            bootstrap = SwarmNode(NodeConfig(), engine=self.net.engine)
            await self._stack.enter_async_context(bootstrap)
            network = replace(
                self._server_config.network, initial_peers=await bootstrap.addresses()
            )
            self._server_config = replace(self._server_config, network=network)
            self._stack.push_async_callback(self._stop_all)
            for span in self._spans:
                await self.add(span)
            self._node = await self.join()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def __enter__(self) -> Self:
        return client_loop.run(self.__aenter__())

    def __exit__(self, *exc_info: object) -> None:
        client_loop.run(self.__aexit__(*exc_info))

    async def _stop_all(self) -> None:
        for server in self._servers.values():
            server.stop()
            server.stop()
        await asyncio.gather(*self._lives.values())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the swarm's event loop and return its result; not from that loop."""
        assert self._loop is not None, "enter the swarm first"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- Servers

    @property
    def server_config(self) -> ServerConfig:
        """What servers are made from, with the address of the bootstrap peer."""
        return self._server_config

    async def add(self, span: BlockSpan | None = None, **changes: Any) -> PeerId:
        """Start a server and return when it is online; ``changes`` are to ``server_config``.

        Without a span the server chooses its blocks. Raises what ``Server.run`` raises.
        """
        online: asyncio.Future[OnlineInfo] = asyncio.get_running_loop().create_future()

        def on_online(info: OnlineInfo) -> None:
            # Called again after a move.
            self.num_blocks = max(self.num_blocks, info.blocks.end)
            self._infos.setdefault(info.peer_id, []).append(info)
            if not online.done():
                online.set_result(info)

        config = replace(self._server_config, **{"blocks": span, **changes})
        server = Server(config, Watchers(on_online=on_online), engine=self.net.engine)
        life = asyncio.create_task(server.run(), name="server")
        waiting: set[asyncio.Future[Any]] = {life, online}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            server.stop()
            raise
        if not online.done():
            await life
        info = online.result()
        self.model_id = info.model
        self._servers[info.peer_id], self._lives[info.peer_id] = server, life
        self.peers.append(info.peer_id)
        return info.peer_id

    def infos(self, peer: PeerId) -> tuple[OnlineInfo, ...]:
        """What a server said when it came online, and again after every move; the latest last."""
        return tuple(self._infos[peer])

    def info(self, peer: PeerId) -> OnlineInfo:
        """What a server said when it last came online: its blocks, its addresses, its limits."""
        return self._infos[peer][-1]

    def stop(self, peer: PeerId) -> "asyncio.Task[None]":
        """Ask a server to leave, as SIGTERM does: it drains. Called twice: it leaves at once.

        The task returned ends when the server has left.
        """
        self._in_loop(self._servers[peer].stop)
        return self._lives[peer]

    def life(self, peer: PeerId) -> "asyncio.Task[None]":
        """The task in which a server runs."""
        return self._lives[peer]

    # -- Faults

    def kill(self, peer: PeerId) -> None:
        """The peer is gone, as after SIGKILL: its streams break and it cannot be dialled."""
        self._in_loop(lambda: self.net.kill(peer))

    def pause(self, peer: PeerId) -> None:
        """The peer stands still, as after SIGSTOP, until `resume`."""
        self._in_loop(lambda: self.net.pause(peer))

    def resume(self, peer: PeerId) -> None:
        """The peer goes on, as after SIGCONT; what it was sent meanwhile arrives now."""
        self._in_loop(lambda: self.net.resume(peer))

    def partition(self, peer: PeerId, *others: PeerId, one_way: bool = False) -> None:
        """Drop what the peer and ``others`` (default: every peer there is) send to each other.

        ``one_way``: only what the peer sends. No stream breaks; the loss shows as silence.
        """

        def cut() -> None:
            for other in others or self.net.transports:
                self.net.cut(peer, other, one_way=one_way)

        self._in_loop(cut)

    def heal(self, peer: PeerId) -> None:
        """End the peer's partitions. What was dropped stays lost, so old streams stay broken."""

        def heal() -> None:
            for other in self.net.transports:
                self.net.heal(peer, other)

        self._in_loop(heal)

    # -- Clients

    @property
    def node(self) -> SwarmNode:
        """The node of the clients that `connection` and `session` make."""
        assert self._node is not None, "enter the swarm first"
        return self._node

    async def join(self) -> SwarmNode:
        """One more peer that only dials; it leaves with the swarm."""
        network = replace(self._server_config.network, client_mode=True, identity_path=None)
        node = SwarmNode(network, engine=self.net.engine)
        return await self._stack.enter_async_context(node)

    def connection(self, **options: Any) -> SwarmConnection:
        """A client's connection on `node`; closed with the swarm. ``options``: ClientConfig's."""
        peers = self._server_config.network.initial_peers
        config = ClientConfig(**{"initial_peers": peers, **self._client_options, **options})
        model = config.dht_prefix or self.model_id
        connection = SwarmConnection(config, model, self.num_blocks, self.node)
        self._stack.push_async_callback(connection.close)
        return connection

    @asynccontextmanager
    async def session(
        self, *, max_length: int, blocks: BlockSpan | None = None, **options: Any
    ) -> AsyncIterator[SessionRows]:
        """A session over ``blocks`` (default: all), closed with the context, and its connection.

        ``max_length``: tokens per row. ``options``: ClientConfig's.
        """
        connection = self.connection(**options)
        session = SessionRows(
            connection, blocks or BlockSpan(0, self.num_blocks), max_length=max_length
        )
        try:
            yield session
        finally:
            await session.close()
            await connection.close()

    def model(
        self,
        kind: type[AutoDistributedModel] = AutoDistributedModelForCausalLM,
        **options: Any,
    ) -> PreTrainedModel:
        """A model of a new client, a peer of its own; its connection is closed with the swarm.

        ``options`` are those of ``from_pretrained``. Needs a swarm that was entered with ``with``.
        """
        assert self._loop is client_loop.loop, "enter the swarm with `with`, not with `async with`"
        name = self._server_config.source.model
        remote = kind.from_pretrained(
            name,
            **{
                "initial_peers": [self._alias()],
                "dht_prefix": self.model_id,
                **self._client_options,
                **options,
            },
        )
        self._stack.push_async_callback(remote.remote_blocks.sequence_manager.access.close)
        return remote

    def _alias(self) -> str:
        """An address of the bootstrap peer that no other client has, so that none share a node."""
        (address, *_) = self._server_config.network.initial_peers
        _, _, peer = address.rpartition("/p2p/")
        alias = f"/memory/{next(self._aliases)}/p2p/{peer}"
        nodes.engines[alias] = self.net.engine
        self._stack.callback(nodes.engines.pop, alias)
        return alias

    def _in_loop(self, work: Callable[[], object]) -> None:
        """Run ``work`` in the swarm's loop, where its streams live, and wait for its end."""

        async def call() -> None:
            work()

        try:
            is_inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_inside = False
        if is_inside:
            work()
        else:
            self.run(call())
