"""Access to the blocks of one model in one swarm, for synchronous callers.

Owns the connection (shared within the process), the view of the servers, and the choice of routes
for a range of blocks. Knows no tensors and no tokens.
"""

import asyncio
import copy
import operator
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import msgspec

from petals.client.config import ClientConfig
from petals.client.connection.event_loop import client_loop
from petals.client.connection.nodes import nodes
from petals.client.routing.config_source import ConfigSource
from petals.client.routing.route import Needs
from petals.client.routing.spending_policy import NoSpendingPolicy, SpendingPolicyBase
from petals.client.routing.swarm_state import SwarmState
from petals.data_structures import RemoteSpanInfo, ServerInfo
from petals.errors import ConfigError, MissingBlocksError, PeerFailed, PetalsError, SwarmError
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, PeerId
from petals.wire.replies import Info
from petals.wire.requests import GetInfo
from petals.wire.services import BLOCKS_SERVICE

__all__ = ["MissingBlocksError"]

T = TypeVar("T")

SequenceManagerConfig = ClientConfig
"""Its name in the original before version 2.0."""


class SwarmConnection:
    """The view of one model's servers, connected at first use; a manager's slices share it.

    It belongs to the event loop that uses it. In another one, which is that of a forked child, it
    connects anew and leaves the first view to the parent process. ``source``: the object that
    ``config`` was read from, if its attributes may change later.
    """

    def __init__(
        self,
        config: ClientConfig,
        model: str,
        num_blocks: int,
        node: SwarmNode | None = None,
        source: ConfigSource | None = None,
    ) -> None:
        self.model = model
        self.num_blocks = num_blocks
        self._config = config
        self._source = source
        self._given = node
        self._view: SwarmState | None = None
        self._connecting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.ready = threading.Event()
        """Set once the swarm has been joined."""

    @property
    def config(self) -> ClientConfig:
        """The config as it stands now. Raises ConfigError for a change that is not allowed."""
        if self._source is not None:
            self._config = self._source.read(self._config)
        return self._config

    @property
    def settings(self) -> object:
        """What an equal connection is made from: the object it is set by, or the config."""
        if self._source is not None and getattr(self._source.source, "dht_prefix", None):
            return self._source.source
        return replace(self.config, dht_prefix=self.model)

    async def view(self) -> SwarmState:
        """The view under the present config, once connected.

        Raises BootstrapFailed, ConfigError, SwarmError.
        """
        config = self.config
        self._enter_loop()
        async with self._connecting:
            if self._closed:
                raise SwarmError("This sequence manager was shut down.", hint="Make a new one.")
            if self._view is None:
                node = self._given or await nodes.acquire(config)
                self._view = SwarmState(node, config, self.model, self.num_blocks)
                self.ready.set()
            elif self._view.config is not config:
                # Sessions and passes under way keep the view, and so the config, that they have.
                self._view = self._view.under(config)
            return self._view

    async def close(self) -> None:
        """End open sessions and give the node back. Idempotent."""
        self._enter_loop()
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

    def _enter_loop(self) -> None:
        """In a new event loop, forget what belongs to the old one; its lock may be held for ever.

        Raises SwarmError if the connection was given a node, which cannot be had a second time.
        """
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None:
            self.ready = threading.Event()
        if self._loop is not None and self._given is not None:
            raise SwarmError(
                "The node of this sequence manager belongs to the process that forked this one.",
                hint="Make the node, or the manager, in the child process.",
            )
        self._loop, self._view, self._connecting = loop, None, asyncio.Lock()


@dataclass(slots=True)
class SequenceManagerState:
    """What managers of one model share. ``rpc_info``: see the manager; None: to be asked anew."""

    rpc_info: dict[str, Any] | None = None


class RemoteSequenceManager:
    """A range of a model's blocks and the servers that run them.

    ``block_uids`` are the original's (``"prefix.0", "prefix.1", ...``), or a BlockSpan. The model's
    name in the swarm is ``config.dht_prefix``, else the uids' prefix. ``config``: a ClientConfig,
    or an object with fields of it as attributes, such as a model's config; those that are set later
    count for sessions and sequences begun from then on. ``dht``: a hivemind.DHT, whose peers are
    joined in place of ``config.initial_peers``. ``state``: that of another manager, to share.
    ``node``: use this running node instead of our own.

    Slices share the connection, and are of the manager's own class. It ends with ``shutdown``, with
    the context, when the last of them is forgotten, or with the process.
    """

    def __init__(
        self,
        config: ClientConfig | object,
        block_uids: BlockSpan | Sequence[str],
        *,
        dht: object = None,
        state: SequenceManagerState | None = None,
        node: SwarmNode | None = None,
    ) -> None:
        own, source = ClientConfig.of(config), None
        if not isinstance(config, ClientConfig):
            source = ConfigSource(config)
        if dht is not None:
            own = replace(own, initial_peers=_peers_of(dht))
        self.dht = dht
        self.state = state or SequenceManagerState()
        self.policy: SpendingPolicyBase = NoSpendingPolicy()
        prefix, self.blocks = _named(block_uids)
        self._origin: RemoteSequenceManager | None = None
        model = own.dht_prefix or prefix
        if not model:
            raise ConfigError(
                "The model has no name in the swarm.",
                hint="Pass dht_prefix=NAME, the name its servers were started with.",
            )
        self.access = SwarmConnection(own, model, self.blocks.end, node, source)
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
        # A copy: attributes and overridden methods of a user's own class stay.
        part = copy.copy(self)
        part.blocks = BlockSpan(self.blocks.start + start, self.blocks.start + end)
        part.state = SequenceManagerState()
        part._origin = self._origin or self
        return part

    @property
    def config(self) -> ClientConfig:
        """The config as it stands now."""
        return self.access.config

    def __copy__(self) -> "RemoteSequenceManager":
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        return part

    def __deepcopy__(self, memo: dict[int, object]) -> "RemoteSequenceManager":
        """A copy of a model shares the connection."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process a connection of its own is made, from the same settings."""
        if self._origin is not None:
            first, span = self._origin.blocks.start, self.blocks
            return operator.getitem, (self._origin, slice(span.start - first, span.end - first))
        return type(self), (self.access.settings, self.blocks)

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

    def is_alive(self) -> bool:
        """False after ``shutdown``."""
        return self.access.is_alive

    @property
    def ready(self) -> threading.Event:
        """Set once the swarm has been joined, which the first use does."""
        return self.access.ready

    @property
    def _thread(self) -> "RemoteSequenceManager":
        """The original's tests read ``_thread.ready``; there is no thread of each manager here."""
        return self

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine in the client's event loop; see ``EventLoopThread.run``."""
        return client_loop.run(work, timeout)

    def make_sequence(
        self,
        start_index: int = 0,
        end_index: int | None = None,
        *,
        mode: Literal["min_latency", "max_throughput"] = "min_latency",
        cache_tokens_needed: int | None = None,
    ) -> list[RemoteSpanInfo]:
        """A route through blocks [start_index, end_index); all are counted from our first.

        ``max_throughput`` draws among many. Raises MissingBlocksError, NoCapacity, UnknownAdapter,
        and BootstrapFailed at first use.
        """
        blocks, first = self[start_index:end_index].blocks, self.blocks.start
        needs = Needs(blocks=blocks, model=self.model, cache_tokens=cache_tokens_needed or 0)

        async def find() -> list[RemoteSpanInfo]:
            view = await self.access.view()
            route = await view.route(needs, throughput=mode == "max_throughput")
            known = (await view.records()).records
            return [
                RemoteSpanInfo(
                    hop.peer_id,
                    hop.blocks.start - first,
                    hop.blocks.end - first,
                    ServerInfo.of(known[hop.peer_id]),
                )
                for hop in route
            ]

        return client_loop.run(find())

    @property
    def rpc_info(self) -> dict[str, Any]:
        """What a server of the first block says of itself: all of ``wire.replies.Info``, and

        ``cache_tokens_available``, the free cache in tokens of one block. Asked once; again after
        ``state.rpc_info = None``. Raises MissingBlocksError, PeerError.
        """
        if self.state.rpc_info is None:
            info = client_loop.run(self._ask_first_server())
            self.state.rpc_info = {
                **msgspec.structs.asdict(info),
                "cache_tokens_available": info.tokens_free,
                "dht_client_mode": False,
            }
        return self.state.rpc_info

    async def _ask_first_server(self) -> Info:
        view = await self.access.view()
        first = BlockSpan(self.blocks.start, self.blocks.start + 1)
        (hop,) = await view.route(Needs(blocks=first, model=self.model))
        seconds = view.connect_seconds(hop.peer_id)
        async with view.channels.lent(hop.peer_id, BLOCKS_SERVICE, seconds) as channel:
            timeout = view.config.request_timeout
            info, _ = await channel.request(GetInfo(), expect=Info, timeout=timeout)
        return info

    def get_request_metadata(
        self, protocol: str, args_structure: object = None, *args: object, **kwargs: object
    ) -> dict[str, Any]:
        """What a request brings along, as in the original; a subclass may override it.

        protocol: "rpc_forward", "rpc_backward" or "rpc_inference". ``output_compression`` in the
        answer of a subclass is honoured, see ``client.routing.wire_dtype``.
        """
        return {
            "points": self.policy.get_points(protocol, *args, **kwargs),
            "active_adapter": self.config.active_adapter,
            "args_structure": args_structure,
        }

    def get_retry_delay(self, attempt_no: int) -> float:
        """Pause (s) before attempt ``attempt_no`` + 1; none before the first repetition."""
        return self.config.backoff_seconds(attempt_no + 1)

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
            client_loop.finish(self.access.close)


def _close_soon(access: SwarmConnection) -> None:
    """A manager that was forgotten with all its slices, in whatever thread that was noticed."""
    client_loop.forget(access.close)
    if access.is_alive:
        client_loop.start(access.close)


def _peers_of(dht: object) -> tuple[str, ...]:
    """Addresses of the swarm that a hivemind.DHT is in. Raises ConfigError if it names none."""
    given = getattr(dht, "initial_peers", None) or ()
    if not getattr(dht, "client_mode", True):
        given = (*given, *dht.get_visible_maddrs())  # type: ignore[attr-defined]
    if not given:
        raise ConfigError(
            "The dht names no peers to join.",
            hint="Pass hivemind.DHT(initial_peers=[ADDR], ...), or leave dht out and give "
            "initial_peers=[ADDR] in the config.",
        )
    return tuple(str(address) for address in given)


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
