"""The interface between Petals and a peer-to-peer engine.

Two engines implement it: ``swarm.libp2p`` (real networks) and ``testing.memory_net`` (one process).
An engine authenticates peers (a stream's ``remote`` is proven), carries bytes, and keeps expiring
records. It must not know frames, messages, the meaning of tickets, or models.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from petals.types import PeerId

BOOTSTRAP_TIMEOUT_SECONDS = 5.0
"""Time limit for dialling the initial peers."""

OPEN_TIMEOUT_SECONDS = 5.0
"""Default time limit for opening an admitted stream to a peer."""


class Stream(Protocol):
    """A bidirectional stream of bytes to one authenticated peer.

    Every wait raises PeerUnreachable once the stream is lost.
    """

    @property
    def remote(self) -> PeerId:
        """The peer at the other end."""
        ...

    @property
    def remote_address(self) -> str:
        """Multiaddress the peer is seen at; empty if the engine does not know."""
        ...

    async def read_exactly(self, num_bytes: int) -> bytes:
        """The next ``num_bytes`` bytes. Raises PeerUnreachable if the stream ends before."""
        ...

    @property
    def is_ready(self) -> bool:
        """True if ``drain`` would return at once: the queue is short, and the stream is not lost as
        far as the engine knows.
        """
        ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data``; follow with ``drain`` unless the stream ``is_ready``."""
        ...

    async def drain(self) -> None:
        """Wait until the queue is short (back-pressure). Raises PeerUnreachable if the stream is
        lost.
        """
        ...

    async def close(self) -> None:
        """Send what is queued, then end the stream. Never raises for a stream already lost."""
        ...

    def reset(self) -> None:
        """Drop the stream at once, with whatever is queued."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Called in a task of its own for every stream that a peer opens; it owns the stream."""


@dataclass(frozen=True, slots=True)
class StoredValue:
    """One value under (key, subkey) and the wall-clock time at which it ceases to exist."""

    value: bytes
    expires_at: float


class RecordStore(Protocol):
    """Distributed, expiring: key -> subkey -> value; the later expiry wins."""

    async def store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        """True if at least one peer, perhaps this one, has stored it."""
        ...

    async def get(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, StoredValue]]:
        """The freshest values of every key; a key without values maps to an empty mapping."""
        ...


class Transport(Protocol):
    """One peer's presence in the network."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def records(self) -> RecordStore: ...

    async def start(self, others: Sequence[str] = ()) -> tuple[PeerId, ...]:
        """Listen and dial the initial peers, and ``others`` if none of them answers; returns the
        peers that answered.

        Raises BootstrapFailed if none does, within ``BOOTSTRAP_TIMEOUT_SECONDS`` (twice that with
        others).
        """
        ...

    async def join(self, peers: Sequence[PeerId]) -> None:
        """Take part in the record store through these members. Raises BootstrapFailed."""
        ...

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Record the addresses at which a peer says that it can be dialled."""
        ...

    def known(self) -> tuple[str, ...]:
        """Addresses of members given to ``learn``, latest first, each ending in ``/p2p/<id>``."""
        ...

    async def addresses(self) -> tuple[str, ...]:
        """Multiaddresses others can dial, each ending in ``/p2p/<our id>``."""
        ...

    async def connect(self, address: str) -> PeerId:
        """Dial one multiaddress. Raises PeerUnreachable."""
        ...

    def doubt(self, peer: PeerId) -> None:
        """A stream to ``peer`` opened and stayed mute: its connection may be dead, for example
        because the peer has another address now.
        """
        ...

    async def open_stream(self, peer: PeerId, protocol: str, timeout: float) -> Stream:
        """A new stream to ``peer``. Raises PeerUnreachable or PeerTimeout."""
        ...

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Hand streams that peers open for ``protocol`` to ``handler``."""
        ...

    async def peers(self) -> frozenset[PeerId]:
        """Peers to which a connection is open."""
        ...

    async def use_relays(self, relays: Sequence[str]) -> None:
        """Be reached through these members (multiaddresses) from now on. Every stream is lost, and
        the callbacks of ``on_restart`` are called.
        """
        ...

    async def probe(self, address: str, timeout: float) -> bool:
        """Whether ``address`` accepts a new connection; connections that are open do not count."""
        ...

    def on_restart(self, callback: Callable[[], None]) -> None:
        """Call back after the engine was restarted under the same id (records must be stored
        again).
        """
        ...

    async def close(self) -> None:
        """Leave; every stream is lost. Safe to call twice."""
        ...
