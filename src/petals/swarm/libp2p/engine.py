"""The libp2p engine behind ``swarm.transport``.

Combines the daemon (streams, addresses, NAT traversal) and the distributed dictionary into one
transport, and starts the daemon again under the same id and ports if it dies. No engine type leaves
this package. Must not know frames.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from cachetools import LRUCache, TTLCache
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from petals.errors import BootstrapFailed, PeerTimeout, PeerUnreachable, PetalsError
from petals.logs import get_logger
from petals.swarm.address import Address
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import EngineParts
from petals.swarm.libp2p.daemon import Daemon, DaemonError, DaemonStream
from petals.swarm.libp2p.dht import DhtRecords
from petals.swarm.transport import BOOTSTRAP_TIMEOUT_SECONDS, StreamHandler
from petals.types import PeerId

logger = get_logger(__name__)

_LOOKUP_SECONDS = 2.0
"""How long a peer without a known address is looked up again: it may have joined just now."""

_LOOKUP_PAUSE_SECONDS = 0.2
"""Pause between two such lookups."""

_PUNCH_SECONDS = 1.5
"""How long a relayed stream waits for a direct connection, which follows after 0.3 to 0.8 s or
never.
"""

_PUNCH_PAUSE_SECONDS = 0.1
"""Pause between two looks for a direct connection."""

_PUNCH_AGAIN_SECONDS = 60.0
"""A peer that stayed relayed is waited for again after this time."""

_CIRCUIT_SECONDS = 5.0
"""Time limit for the first relay to accept this peer."""

_STRAGGLER_SECONDS = 0.3
"""Time for other initial peers to answer after the first has."""

_RESTART_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Pause before each attempt to start the daemon again; the last one repeats."""

_DOUBT_SECONDS = (2.0, 15.0)
"""A connection is closed when a stream on it stays mute this long (s) after an earlier one did: at
least the first, so that streams opened at the same time count once, and at most the second.
"""

_MULTISTREAM = b"\x13/multistream/1.0.0\n"
"""The first bytes that a libp2p peer sends on a TCP connection."""

_MAX_KNOWN_PEERS = 20_000
"""Peers whose addresses are kept; those used least recently are dropped."""

_MAX_ADDRESSES = 8
"""Addresses kept of one peer."""


class Libp2pTransport:
    """One peer on the real network."""

    def __init__(self, parts: EngineParts) -> None:
        self.peer_id = parts.identity.peer_id
        self._parts = parts
        self._dht = DhtRecords(parts.admission, parts.clock)
        self._relays: tuple[str, ...] = ()
        self._daemon = self._new_daemon()
        self._up = asyncio.Event()
        self._listen = parts.config.listen_maddrs
        self._handlers: dict[str, StreamHandler] = {}
        self._known: LRUCache[PeerId, tuple[str, ...]] = LRUCache(_MAX_KNOWN_PEERS)
        self._relayed_since: TTLCache[PeerId, float] = TTLCache(
            _MAX_KNOWN_PEERS, ttl=_PUNCH_AGAIN_SECONDS, timer=parts.clock.monotonic
        )
        self._mute_since: TTLCache[PeerId, float] = TTLCache(
            _MAX_KNOWN_PEERS, ttl=_DOUBT_SECONDS[1], timer=parts.clock.monotonic
        )
        self._moved: set[PeerId] = set()
        """Peers whose known addresses the daemon has not been given yet."""
        self._on_restart: list[Callable[[], None]] = []
        self._background = BackgroundTasks()
        self._closed = False

    @property
    def records(self) -> DhtRecords:
        return self._dht

    async def start(self, others: Sequence[str] = ()) -> tuple[PeerId, ...]:
        initial = [Address.of_peer(text) for text in self._parts.config.initial_peers]
        more = [address for address in map(Address, others) if address.peer_id]
        await self._start_daemon()
        self._listen = await self._fixed_ports()
        self._up.set()
        try:
            return await self._connect_first(initial)
        except BootstrapFailed:
            if not more:
                raise
        logger.warning("no initial peer answers; trying %d addresses of other members", len(more))
        return await self._connect_first([*initial, *more])

    async def join(self, peers: Sequence[PeerId]) -> None:
        await self._dht.join(peers)
        if self._parts.config.initial_peers:
            self._background.start(self._keep_joined(), "staying in touch with initial peers")

    async def addresses(self) -> tuple[str, ...]:
        return await self._daemon.addresses()

    async def connect(self, address: str) -> PeerId:
        peer = Address.of_peer(address).peer_id
        try:
            async with asyncio.timeout(BOOTSTRAP_TIMEOUT_SECONDS):
                await self._daemon.connect(peer, [address])
        except (DaemonError, TimeoutError) as error:
            raise PeerUnreachable("No peer answers at this address.", peer_id=peer) from error
        return peer

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        usable = tuple(text for text in addresses if Address(text).is_dialable)[:_MAX_ADDRESSES]
        if usable:
            before = self._known.pop(peer, None)  # those learned last are at the end
            self._known[peer] = usable
            if before is not None and before != usable:
                self._moved.add(peer)
                if len(self._moved) > _MAX_KNOWN_PEERS:
                    self._moved.pop()  # it is dialled as the daemon knows it

    def known(self) -> tuple[str, ...]:
        return tuple(
            text if Address(text).peer_id else str(Address(text).with_peer(peer))
            for peer, addresses in reversed(list(self._known.items()))
            for text in addresses
        )

    def doubt(self, peer: PeerId) -> None:
        """The daemon notices a dead connection after half a minute or more. Until then it opens
        streams on it, and does not dial the peer's new address.
        """
        now = self._parts.clock.monotonic()
        if now - self._mute_since.setdefault(peer, now) >= _DOUBT_SECONDS[0]:
            del self._mute_since[peer]
            self._background.start(self._dial_anew(peer), "closing a dead connection")

    async def _dial_anew(self, peer: PeerId) -> None:
        await self._daemon.disconnect(peer)
        self._moved.add(peer)

    async def open_stream(self, peer: PeerId, protocol: str, timeout: float) -> DaemonStream:
        give_up_at = self._parts.clock.monotonic() + timeout / 2
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
                stream = await self._open(peer, protocol)
                if Address(stream.remote_address).is_relayed:
                    stream = await self._prefer_direct(stream, protocol, give_up_at)
                return stream
        except TimeoutError:
            raise PeerTimeout(f"No stream within {timeout:g} s.", peer_id=peer) from None

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler
        await self._daemon.serve(protocol, self._accept)

    async def peers(self) -> frozenset[PeerId]:
        return frozenset(peer for peer, _ in await self._daemon.connections())

    async def use_relays(self, relays: Sequence[str]) -> None:
        """Starts the daemon again, which takes relays at its start only."""
        self._relays = tuple(relays)
        self._up.clear()
        await self._restart()
        clock = self._parts.clock
        give_up_at = clock.monotonic() + _CIRCUIT_SECONDS
        while not any(Address(text).is_relayed for text in await self.addresses()):
            if clock.monotonic() > give_up_at:
                logger.warning("no relay has accepted this peer yet")
                return
            await clock.sleep(_LOOKUP_PAUSE_SECONDS)

    async def probe(self, address: str, timeout: float) -> bool:
        """Connects over TCP, without the daemon, which would use the connection that is open."""
        target = Address(address)
        if target.transport != "tcp":
            return False
        writer = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(target.host, target.port)
                writer.write(_MULTISTREAM)
                return await reader.readexactly(len(_MULTISTREAM)) == _MULTISTREAM
        except (OSError, OverflowError, TimeoutError, asyncio.IncompleteReadError):
            return False
        finally:
            if writer is not None:
                writer.transport.abort()

    def on_restart(self, callback: Callable[[], None]) -> None:
        self._on_restart.append(callback)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._background.close()
        await self._dht.close()
        await self._daemon.close()

    # -- connecting ----------------------------------------------------------------------------

    async def _connect_first(self, initial: Sequence[Address]) -> tuple[PeerId, ...]:
        """Dial all initial peers; returns those that answer within ``_STRAGGLER_SECONDS`` of the
        first. Raises BootstrapFailed if there are initial peers and none answers.
        """
        reached: set[PeerId] = set()
        loop = asyncio.get_running_loop()

        async def dial(address: Address) -> None:
            with contextlib.suppress(PetalsError):
                reached.add(await self.connect(address.text))
                # An expired limit cannot be moved: it is ending the dials right now.
                if len(reached) == 1 and not limit.expired():
                    limit.reschedule(loop.time() + _STRAGGLER_SECONDS)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BOOTSTRAP_TIMEOUT_SECONDS) as limit:
                async with asyncio.TaskGroup() as dials:
                    for address in initial:
                        dials.create_task(dial(address))
        if initial and not reached:
            tried = ", ".join(address.text for address in initial[:3])
            raise BootstrapFailed(
                f"None of the initial peers answers ({tried}).",
                hint="Check the address, that the peer runs, and that its port is open.",
            )
        return tuple(sorted(reached))

    async def _open(self, peer: PeerId, protocol: str) -> DaemonStream:
        clock = self._parts.clock
        give_up_at = clock.monotonic() + _LOOKUP_SECONDS
        known = self._known.get(peer, ())
        if known and peer in self._moved:
            # Left to itself, the daemon would first wait for the addresses of before.
            self._moved.discard(peer)
            with contextlib.suppress(DaemonError):
                await self._daemon.connect(peer, known)
        while True:
            try:
                return await self._daemon.open_stream(peer, protocol)
            except DaemonError as error:
                unknown = "failed to dial" not in str(error)
                if known:
                    addresses, known = known, ()
                    with contextlib.suppress(DaemonError):
                        await self._daemon.connect(peer, addresses)
                        continue
                if not unknown or clock.monotonic() > give_up_at:
                    raise PeerUnreachable("The peer cannot be reached.", peer_id=peer) from error
            await clock.sleep(_LOOKUP_PAUSE_SECONDS)

    async def _prefer_direct(
        self, stream: DaemonStream, protocol: str, give_up_at: float
    ) -> DaemonStream:
        """A direct stream in place of a relayed one, if the two daemons connect directly in time.

        They try to as soon as a relay connects them; only streams opened afterwards are direct.
        """
        clock, peer = self._parts.clock, stream.remote
        since = self._relayed_since.setdefault(peer, clock.monotonic())
        give_up_at = min(since + _PUNCH_SECONDS, give_up_at)
        try:
            while clock.monotonic() < give_up_at:
                await clock.sleep(_PUNCH_PAUSE_SECONDS)
                ways = [way for other, way in await self._daemon.connections() if other == peer]
                if not all(Address(way).is_relayed for way in ways):
                    direct = await self._daemon.open_stream(peer, protocol)
                    stream.reset()
                    return direct
        except BaseException:
            stream.reset()
            raise
        return stream

    async def _accept(self, protocol: str, stream: DaemonStream) -> None:
        await self._handlers[protocol](stream)

    async def _keep_joined(self) -> None:
        """Join again and again: an initial peer that was restarted knows no member, and the swarm
        would fall into two parts.
        """
        while True:
            await self._parts.clock.sleep(self._parts.config.rejoin_seconds)
            if self._up.is_set():
                await self._rejoin(self._parts.config.initial_peers)

    async def _rejoin(self, addresses: Sequence[str]) -> None:
        reached = []
        for address in addresses:
            with contextlib.suppress(PetalsError):
                reached.append(await self.connect(address))
        with contextlib.suppress(PetalsError):
            await self._dht.join(reached)

    # -- restarts of the daemon --------------------------------------------------------------------

    def _new_daemon(self) -> Daemon:
        parts = self._parts
        return Daemon(parts.config, parts.identity, self._on_daemon_exit, self._relays)

    async def _start_daemon(self) -> None:
        await self._daemon.start(self._listen)
        # A peer behind a relay only asks: the directory must not wait for relayed answers.
        only_asks = self._parts.config.client_mode or bool(self._relays)
        await self._dht.start(self._daemon.p2p, only_asks)

    def _on_daemon_exit(self) -> None:
        if not self._closed and self._up.is_set():
            self._up.clear()
            logger.warning("the network daemon ended; starting it again")
            self._background.start(self._restart(), "restart of the network daemon")

    async def _restart(self) -> None:
        attempt = 0
        while not self._closed:
            pause = _RESTART_SECONDS[min(attempt, len(_RESTART_SECONDS) - 1)]
            await self._parts.clock.sleep(pause)
            await self._daemon.close()
            self._daemon = self._new_daemon()
            try:
                await self._revive()
            except (PetalsError, P2PDaemonError, OSError) as error:
                attempt += 1
                logger.warning("the network daemon does not start: %s", error)
                continue
            break
        for callback in self._on_restart:
            callback()

    async def _revive(self) -> None:
        await self._start_daemon()
        for protocol in self._handlers:
            await self._daemon.serve(protocol, self._accept)
        if self._daemon.has_ended:
            raise DaemonError("The network daemon ended at once.")
        self._up.set()
        recent = [a for known in list(self._known.values())[-20:] for a in known[:1]]
        await self._rejoin([*self._parts.config.initial_peers, *recent])

    async def _fixed_ports(self) -> tuple[str, ...]:
        """The addresses to listen on, with the ports that were chosen for port 0, so that a restart
        keeps the addresses.
        """
        ports: dict[str, int] = {}
        for own in map(Address, await self._daemon.addresses()):
            ports.setdefault(own.transport, own.port)
        listen = [Address(text) for text in self._listen]
        return tuple(
            str(address if address.port else address.with_port(ports.get(address.transport, 0)))
            for address in listen
        )
