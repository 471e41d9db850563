"""A network in memory: a transport beside libp2p, with latency and faults that a test controls.

Streams have back-pressure and deliver in order, ``latency_seconds`` of the given clock after each
write. ``cut`` drops what a link carries (the peers notice only by silence), ``pause`` holds what a
peer sends and receives until ``resume``, ``kill`` removes a peer (its streams break at once).
``on_write`` is called before each write. Records are kept in one dictionary per swarm key and
expire by the clock. A peer after ``hide`` is reached only through relays, once it uses them.
Must not know frames and messages.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from petals.clock import Clock, SystemClock
from petals.errors import BootstrapFailed, PeerTimeout, PeerUnreachable
from petals.swarm.address import CIRCUIT
from petals.swarm.config import EngineParts
from petals.swarm.transport import StoredValue, StreamHandler
from petals.types import PeerId

_HIGH_WATER_BYTES = 256 * 1024


class MemoryNet:
    """All peers of a test and the links between them.

    ``clock``: what latencies and record lifetimes are measured by; the system's by default.
    """

    def __init__(self, clock: Clock | None = None, latency_seconds: float = 0.0) -> None:
        self.clock: Clock = clock or SystemClock()
        self.latency_seconds = latency_seconds
        self.transports: dict[PeerId, MemoryTransport] = {}
        self.on_write: Callable[[PeerId, PeerId, int], None] = lambda source, target, size: None
        """Called with (source, target, bytes) of every write on a stream."""
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._hidden: set[PeerId] = set()
        self._paused: dict[PeerId, list[tuple[PeerId, PeerId, Callable[[], None]]]] = {}
        self._records: dict[bytes, dict[str, dict[str, StoredValue]]] = defaultdict(dict)

    def engine(self, parts: EngineParts) -> "MemoryTransport":
        """Engine for ``SwarmNode``: a peer of this network."""
        return MemoryTransport(self, parts)

    def cut(self, one: PeerId, other: PeerId, *, one_way: bool = False) -> None:
        """Drop bytes from ``one`` to ``other``, unless ``one_way`` also back. No stream breaks."""
        self._cut.add((one, other))
        if not one_way:
            self._cut.add((other, one))

    def heal(self, one: PeerId, other: PeerId) -> None:
        """End a cut. The dropped bytes stay lost, so streams from before do not recover."""
        self._cut -= {(one, other), (other, one)}

    def hide(self, peer: PeerId) -> None:
        """The peer is behind a NAT: it can dial, but cannot be dialled."""
        self._hidden.add(peer)

    def is_hidden(self, peer: PeerId) -> bool:
        """True if the peer cannot be dialled directly."""
        return peer in self._hidden

    def pause(self, peer: PeerId) -> None:
        """Hold every byte that the peer sends or receives, until `resume`."""
        self._paused.setdefault(peer, [])

    def resume(self, peer: PeerId) -> None:
        """End a pause: the held bytes are delivered in order."""
        for source, target, action in self._paused.pop(peer, []):
            self.pass_on(source, target, action)

    def pass_on(self, source: PeerId, target: PeerId, action: Callable[[], None]) -> None:
        """Call ``action``, a delivery to ``target``, after the latency, or hold it in a pause."""
        for peer in (source, target):
            if peer in self._paused:
                self._paused[peer].append((source, target, action))
                return
        if self.latency_seconds:
            self.clock.call_later(self.latency_seconds, action)
        else:
            action()

    def kill(self, peer: PeerId) -> None:
        """Remove the peer: its streams break at once and new ones cannot be opened."""
        transport = self.transports.pop(peer, None)
        if transport is not None:
            transport.break_streams()

    def is_cut(self, source: PeerId, target: PeerId) -> bool:
        """True if bytes from ``source`` to ``target`` are dropped."""
        return (source, target) in self._cut

    def is_mute(self, one: PeerId, other: PeerId) -> bool:
        """True if the two cannot open a stream now: a cut or a pause keeps them silent."""
        is_cut = self.is_cut(one, other) or self.is_cut(other, one)
        return is_cut or one in self._paused or other in self._paused

    def records_of(self, swarm: bytes) -> dict[str, dict[str, StoredValue]]:
        """The records of the swarm with this key (empty bytes: the open one)."""
        return self._records[swarm]


class _Pipe:
    """One direction of a stream."""

    def __init__(self, net: MemoryNet, source: PeerId, target: PeerId) -> None:
        self._net, self._source, self._target = net, source, target
        self._arrived: deque[bytes] = deque()
        self._offset = 0
        self.num_unread = 0
        self._num_arrived = 0
        self._wanted = 0
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self.is_over = False

    def write(self, data: bytes) -> None:
        if self.is_over or not data:
            return
        self._net.on_write(self._source, self._target, len(data))
        self.num_unread += len(data)
        if not self._net.is_cut(self._source, self._target):
            self._net.pass_on(self._source, self._target, lambda: self._deliver(data))

    def finish(self) -> None:
        """End of stream, after everything written so far."""
        if not self._net.is_cut(self._source, self._target):
            self._net.pass_on(self._source, self._target, self.end)

    def end(self) -> None:
        self.is_over = True
        self._wake()

    def _deliver(self, data: bytes) -> None:
        if not self.is_over:
            self._arrived.append(data)
            self._num_arrived += len(data)
            if self._num_arrived >= self._wanted:
                self._wake()

    def _wake(self) -> None:
        waiting = [*self._writers] if self.is_over else []
        if self._reader is not None:
            waiting.append(self._reader)
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def read_exactly(self, num_bytes: int) -> bytes:
        while self._num_arrived < num_bytes:
            if self.is_over:
                raise PeerUnreachable("The stream ended.", peer_id=self._source)
            self._wanted = num_bytes
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._take(num_bytes)

    def _take(self, num_bytes: int) -> bytes:
        parts, missing = [], num_bytes
        while missing:
            head = self._arrived[0]
            part = head[self._offset : self._offset + missing]
            parts.append(part)
            missing -= len(part)
            self._offset += len(part)
            if self._offset == len(head):
                self._arrived.popleft()
                self._offset = 0
        self._num_arrived -= num_bytes
        self.num_unread -= num_bytes
        if self.num_unread <= _HIGH_WATER_BYTES:
            while self._writers:
                writer = self._writers.popleft()
                if not writer.done():
                    writer.set_result(None)
        return b"".join(parts)

    @property
    def is_ready(self) -> bool:
        return not self.is_over and self.num_unread <= _HIGH_WATER_BYTES

    async def drain(self) -> None:
        while self.num_unread > _HIGH_WATER_BYTES and not self.is_over:
            writer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._writers.append(writer)
            await writer
        if self.is_over:
            raise PeerUnreachable("The stream is lost.", peer_id=self._target)


class MemoryStream:
    """One end of a stream. ``circuit``: the address it leads through, if it is relayed."""

    def __init__(self, remote: PeerId, inbound: _Pipe, outbound: _Pipe, circuit: str = "") -> None:
        self.remote = remote
        self.remote_address = circuit or _address(remote)
        self._in, self._out = inbound, outbound

    async def read_exactly(self, num_bytes: int) -> bytes:
        return await self._in.read_exactly(num_bytes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._out.write(bytes(data))

    @property
    def is_ready(self) -> bool:
        return self._out.is_ready

    async def drain(self) -> None:
        await self._out.drain()

    async def close(self) -> None:
        self._in.end()
        self._out.finish()

    def reset(self) -> None:
        self._in.end()
        self._out.end()


class MemoryTransport:
    """One peer of a ``MemoryNet``."""

    def __init__(self, net: MemoryNet, parts: EngineParts) -> None:
        self.peer_id = parts.identity.peer_id
        key = parts.admission.key
        self.records = MemoryRecords(net, b"" if key is None else key.secret)
        self._net = net
        self._initial_peers = parts.config.initial_peers
        self._relays: tuple[str, ...] = ()
        self._on_restart: list[Callable[[], None]] = []
        self._handlers: dict[str, StreamHandler] = {}
        self._known: dict[PeerId, tuple[str, ...]] = {}
        self._streams: list[MemoryStream] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, others: Sequence[str] = ()) -> tuple[PeerId, ...]:
        self._net.transports[self.peer_id] = self
        known = self._present(self._initial_peers) or self._present(others)
        if self._initial_peers and not known:
            self._net.transports.pop(self.peer_id)
            raise BootstrapFailed("None of the initial peers answers.", hint="Check the address.")
        return tuple(known)

    def _present(self, addresses: Sequence[str]) -> list[PeerId]:
        return [_peer_of(a) for a in addresses if _peer_of(a) in self._net.transports]

    async def join(self, peers: Sequence[PeerId]) -> None:
        """All records are shared: there is nothing to fetch."""

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Note addresses for `known`; dialling does not need them here."""
        self._known[peer] = tuple(addresses)

    def known(self) -> tuple[str, ...]:
        return tuple(address for known in self._known.values() for address in known)

    async def addresses(self) -> tuple[str, ...]:
        return tuple(f"{relay}{CIRCUIT}/p2p/{self.peer_id}" for relay in self._relays) or (
            _address(self.peer_id),
        )

    async def connect(self, address: str) -> PeerId:
        peer = _peer_of(address)
        if peer not in self._net.transports:
            raise PeerUnreachable("No peer listens there.", peer_id=peer)
        return peer

    def doubt(self, peer: PeerId) -> None:
        """Does nothing: there are no connections that outlive their ends."""

    async def open_stream(self, peer: PeerId, protocol: str, timeout: float) -> MemoryStream:
        target = self._net.transports.get(peer)
        if self._net.is_mute(self.peer_id, peer):
            await self._net.clock.sleep(timeout)
            raise PeerTimeout("The peer does not answer.", peer_id=peer)
        is_hidden = self._net.is_hidden(peer)
        if target is None or protocol not in target._handlers or (is_hidden and not target._relays):
            raise PeerUnreachable("The peer cannot be reached.", peer_id=peer)
        circuit = f"{target._relays[0]}{CIRCUIT}" if is_hidden else ""
        forth = _Pipe(self._net, self.peer_id, peer)
        back = _Pipe(self._net, peer, self.peer_id)
        target._accept(protocol, MemoryStream(self.peer_id, forth, back, circuit))
        return self._keep(MemoryStream(peer, back, forth, circuit))

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def peers(self) -> frozenset[PeerId]:
        return frozenset(self._net.transports) - {self.peer_id}

    async def probe(self, address: str, timeout: float) -> bool:
        peer = _peer_of(address)
        is_there = peer in self._net.transports and not self._net.is_mute(self.peer_id, peer)
        return is_there and not self._net.is_hidden(peer)

    async def use_relays(self, relays: Sequence[str]) -> None:
        self._relays = tuple(relays)
        self.break_streams()
        for callback in self._on_restart:
            callback()

    def on_restart(self, callback: Callable[[], None]) -> None:
        self._on_restart.append(callback)

    async def close(self) -> None:
        if self._net.transports.get(self.peer_id) is self:
            del self._net.transports[self.peer_id]
        self.break_streams()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def break_streams(self) -> None:
        for stream in self._streams:
            stream.reset()
        self._streams.clear()

    def _keep(self, stream: MemoryStream) -> MemoryStream:
        self._streams = [kept for kept in self._streams if not kept._out.is_over]
        self._streams.append(stream)
        return stream

    def _accept(self, protocol: str, stream: MemoryStream) -> None:
        task = asyncio.ensure_future(self._handlers[protocol](self._keep(stream)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class MemoryRecords:
    """The record store that all peers of one swarm share."""

    def __init__(self, net: MemoryNet, swarm: bytes) -> None:
        self._net, self._swarm = net, swarm

    async def store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        values = self._net.records_of(self._swarm).setdefault(key, {})
        known = values.get(subkey)
        if expires_at <= self._net.clock.now() or (known and known.expires_at >= expires_at):
            return False
        values[subkey] = StoredValue(value, expires_at)
        return True

    async def get(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, StoredValue]]:
        records, now = self._net.records_of(self._swarm), self._net.clock.now()
        return {
            key: {s: v for s, v in records.get(key, {}).items() if v.expires_at > now}
            for key in keys
        }


def _address(peer: PeerId) -> str:
    return f"/memory/p2p/{peer}"


def _peer_of(address: str) -> PeerId:
    return PeerId(address.rsplit("/p2p/", 1)[-1])
