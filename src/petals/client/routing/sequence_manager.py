"""Access to the blocks of one model in one swarm, for synchronous callers.

Owns the connection (shared within the process), the view of the servers, and the choice of routes
for a range of blocks. Knows no tensors and no tokens.
"""

import asyncio
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Literal, TypeVar

from petals.client.config import ClientConfig
from petals.client.connection.event_loop import client_loop
from petals.client.connection.nodes import nodes
from petals.client.routing.route import Needs
from petals.client.routing.swarm_state import SwarmState
from petals.errors import ConfigError, PeerFailed, PetalsError, SwarmError
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, Hop, PeerId

T = TypeVar("T")


class SwarmConnection:
    """The view of one model's servers, connected at first use; a manager's slices share it."""

    def __init__(
        self, config: ClientConfig, model: str, num_blocks: int, node: SwarmNode | None = None
    ) -> None:
        self.config = config
        self.model = model
        self.num_blocks = num_blocks
        self._given = node
        self._view: SwarmState | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def view(self) -> SwarmState:
        """The view, once connected. Raises BootstrapFailed, ConfigError, SwarmError."""
        if self._view is not None:
            return self._view
        async with self._connecting:
            if self._closed:
                raise SwarmError("This sequence manager was shut down.", hint="Make a new one.")
            if self._view is None:
                node = self._given or await nodes.acquire(self.config)
                self._view = SwarmState(node, self.config, self.model, self.num_blocks)
            return self._view

    async def close(self) -> None:
        """End open sessions and give the node back. Idempotent."""
        async with self._connecting:
            self._closed = True
            view, self._view = self._view, None
            if view is not None:
                await view.close()
                if self._given is None:
                    await nodes.release(view.node)

    @property
    def is_alive(self) -> bool:
        return not self._closed


class RemoteSequenceManager:
    """A range of a model's blocks and the servers that run them.

    ``blocks`` is a BlockSpan, or block uids as in old Petals (``"prefix.0", "prefix.1", ...``). The
    model's name in the swarm is ``config.dht_prefix``, else the uids' prefix. Slices (``origin`` is
    the whole) share the connection. It ends with ``shutdown``, with the context, when the last of
    them is forgotten, or with the process. ``node``: use this running node instead of our own.
    """

    def __init__(
        self,
        config: ClientConfig | object,
        blocks: BlockSpan | Sequence[str],
        *,
        node: SwarmNode | None = None,
        origin: "RemoteSequenceManager | None" = None,
    ) -> None:
        self.config = ClientConfig.of(config)
        prefix, self.blocks = _named(blocks)
        self._origin = origin
        self.access: SwarmConnection
        if origin is not None:
            self.access = origin.access
            return
        model = self.config.dht_prefix or prefix
        if not model:
            raise ConfigError(
                "The model has no name in the swarm.",
                hint="Pass dht_prefix=NAME, the name its servers were started with.",
            )
        self.access = SwarmConnection(self.config, model, self.blocks.end, node)
        client_loop.at_exit(self.access.close)
        weakref.finalize(self, _close_soon, self.access).atexit = False

    def __enter__(self) -> "RemoteSequenceManager":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator["RemoteSequenceManager"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> "RemoteSequenceManager":
        """Some of the blocks, counted from our first. Raises IndexError, ConfigError for a step."""
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step != 1 or start > end:
                raise ConfigError("Blocks are sliced without a step.", hint="blocks[2:5]")
        else:
            start = range(len(self))[index]
            end = start + 1
        span = BlockSpan(self.blocks.start + start, self.blocks.start + end)
        return RemoteSequenceManager(self.config, span, origin=self._origin or self)

    @property
    def model(self) -> str:
        """The model's name in the swarm."""
        return self.access.model

    @property
    def num_blocks(self) -> int:
        return len(self)

    @property
    def block_uids(self) -> tuple[str, ...]:
        """``"prefix.i"`` for every block."""
        return tuple(f"{self.model}.{i}" for i in range(self.blocks.start, self.blocks.end))

    @property
    def is_alive(self) -> bool:
        """False after ``shutdown``."""
        return self.access.is_alive

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine in the client's event loop; see ``EventLoopThread.run``."""
        return client_loop.run(work, timeout)

    def make_sequence(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        mode: Literal["min_latency", "max_throughput"] = "min_latency",
        cache_tokens_needed: int | None = None,
    ) -> list[Hop]:
        """A route through blocks [start, end) of ours, counted from our first.

        ``max_throughput`` draws among many. Raises MissingBlocksError, NoCapacity, UnknownAdapter,
        and BootstrapFailed at first use.
        """
        blocks = self[start:end].blocks
        needs = Needs(blocks=blocks, model=self.model, cache_tokens=cache_tokens_needed or 0)

        async def find() -> list[Hop]:
            view = await self.access.view()
            return list(await view.route(needs, throughput=mode == "max_throughput"))

        return client_loop.run(find())

    def update(self, *, wait: bool = True) -> None:
        """Read the directory anew. ``wait`` is accepted and always true."""

        async def refresh() -> None:
            await (await self.access.view()).refresh()

        client_loop.run(refresh())

    def on_request_failure(self, peer_id: PeerId, error: PetalsError | None = None) -> None:
        """Avoid a server for ``ban_timeout``, doubled each time."""

        async def note() -> None:
            view = await self.access.view()
            view.note_failure(peer_id, error or PeerFailed("A request failed."))

        client_loop.run(note())

    def on_request_success(self, peer_id: PeerId) -> None:
        """Forget a server's failures."""

        async def note() -> None:
            (await self.access.view()).note_success(peer_id)

        client_loop.run(note())

    def shutdown(self) -> None:
        """End the sessions and the connection; a slice's shutdown does nothing. Idempotent."""
        if self._origin is None and self.access.is_alive:
            client_loop.forget(self.access.close)
            client_loop.run(self.access.close())


def _close_soon(access: SwarmConnection) -> None:
    """A manager that was forgotten with all its slices, in whatever thread that was noticed."""
    client_loop.forget(access.close)
    if access.is_alive:
        client_loop.start(access.close)


def _named(blocks: BlockSpan | Sequence[str]) -> tuple[str, BlockSpan]:
    """Block uids -> (prefix, span). Raises ConfigError unless they follow each other."""
    if isinstance(blocks, BlockSpan):
        return "", blocks
    named = [uid.rpartition(".") for uid in blocks]
    if not named or not all(number.isdigit() for _, _, number in named):
        raise ConfigError("These are not block uids.", hint='["prefix.0", "prefix.1"]')
    start = int(named[0][2])
    expected = [(named[0][0], start + offset) for offset in range(len(named))]
    if [(prefix, int(number)) for prefix, _, number in named] != expected:
        raise ConfigError("Block uids must follow each other.", hint='["prefix.3", "prefix.4"]')
    return named[0][0], BlockSpan(start, start + len(named))
