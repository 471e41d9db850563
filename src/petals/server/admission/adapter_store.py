"""The adapters that a server can apply: its operator's, for every client, and clients' own.

An adapter that a client has put here is for that client alone, counts against its budget, and is
dropped when it was not used for longer than the lease. Knows no streams and no blocks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from petals.clock import Clock
from petals.errors import AdapterRefused, PeerBusy, UnknownAdapter
from petals.models.adapters.low_rank import Adapter
from petals.server.config import ClientLimits
from petals.types import PeerId

_PART_COST_BYTES = 2048
"""Counted for each matrix besides its values, so that the number of tiny ones is limited, too."""

AdapterKey = tuple[PeerId, str]


@dataclass(slots=True, eq=False)
class _StoredAdapter:
    """An adapter and the number of sessions and passes that use it."""

    adapter: Adapter
    num_bytes: int = 0
    used_at: float = 0.0
    num_users: int = 0


class AdapterStore:
    """``preload`` adds adapters of the operator, ``put`` those of clients."""

    def __init__(self, config: ClientLimits, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._preloaded: dict[str, _StoredAdapter] = {}
        self._kept: dict[AdapterKey, _StoredAdapter] = {}

    def preload(self, name: str, adapter: Adapter) -> None:
        """Let every client use ``adapter`` for as long as the server runs."""
        self._preloaded[name] = _StoredAdapter(adapter)

    @property
    def num_bytes(self) -> int:
        """Bytes of all clients' adapters."""
        return sum(kept.num_bytes for kept in self._kept.values())

    def has(self, peer: PeerId, name: str) -> bool:
        """Whether ``peer`` has put ``name`` here; if so, this counts as a use."""
        kept = self._kept.get((peer, name))
        if kept is not None:
            kept.used_at = self._clock.monotonic()
        return kept is not None

    @contextmanager
    def using(self, peer: PeerId, name: str | None) -> Iterator[Adapter | None]:
        """The adapter of that name, the client's own before the operator's; it is kept at least
        until the context ends. None for no name. Raises UnknownAdapter.
        """
        if name is None:
            yield None
            return
        kept = self._kept.get((peer, name)) or self._preloaded.get(name)
        if kept is None:
            raise self._unknown(name)
        kept.num_users += 1
        try:
            yield kept.adapter
        finally:
            kept.num_users -= 1
            kept.used_at = self._clock.monotonic()

    def check_size(self, adapter: Adapter) -> None:
        """Raise AdapterRefused for an adapter larger than the budget of a client."""
        cost, limit = _cost(adapter), self._config.max_adapter_bytes_per_peer
        if cost > limit:
            raise AdapterRefused(
                f"The adapter takes {cost} bytes in these blocks, {limit} is the limit.",
                hint="Use a smaller rank or fewer modules, or have the operator preload it.",
            )

    def put(self, peer: PeerId, name: str, adapter: Adapter) -> None:
        """Keep a checked adapter for ``peer``; the adapters unused for longest are dropped for it.

        Raises AdapterRefused (too large) and PeerBusy (adapters in use fill the budget).
        """
        self.check_size(adapter)
        if self.has(peer, name):
            return
        cost = _cost(adapter)
        mine = {key: kept for key, kept in self._kept.items() if key[0] == peer}
        dropped = _to_drop(mine, cost, self._config.max_adapter_bytes_per_peer)
        others = {key: kept for key, kept in self._kept.items() if key not in dropped}
        dropped |= _to_drop(others, cost, self._config.max_adapter_bytes)
        for key in dropped:
            del self._kept[key]
        self._kept[peer, name] = _StoredAdapter(adapter, cost, self._clock.monotonic())

    def _unknown(self, name: str) -> UnknownAdapter:
        names = ", ".join(self._preloaded)
        return UnknownAdapter(
            f"This server has no adapter {name[:80]!r}.",
            hint=f"It has {names}." if names else "Send it first: model.load_adapter(FOLDER).",
        )

    def drop_unused(self) -> None:
        """Drop adapters that were not used for longer than the lease."""
        oldest = self._clock.monotonic() - self._config.lease_seconds
        for key, kept in list(self._kept.items()):
            if not kept.num_users and kept.used_at < oldest:
                del self._kept[key]


def _to_drop(among: Mapping[AdapterKey, _StoredAdapter], cost: int, limit: int) -> set[AdapterKey]:
    """Keys of adapters to drop, longest unused first, so that ``cost`` more bytes fit the limit.

    Raises PeerBusy if adapters in use leave too little.
    """
    excess = sum(kept.num_bytes for kept in among.values()) + cost - limit
    idle = sorted((kept.used_at, key) for key, kept in among.items() if not kept.num_users)
    dropped: set[AdapterKey] = set()
    for _, key in idle:
        if excess <= 0:
            break
        dropped.add(key)
        excess -= among[key].num_bytes
    if excess > 0:
        raise PeerBusy(
            "The memory for adapters is full, and all of them are in use.",
            hint="Close sessions that use other adapters, or use another server.",
        )
    return dropped


def _cost(adapter: Adapter) -> int:
    return adapter.num_bytes + _PART_COST_BYTES * (1 + len(adapter.parts))
