"""One peer: identity, transport, admission, directory and services together.

A node without services of its own is a bootstrap peer. Must not know models beyond the records in
the directory.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from petals.clock import Clock, SystemClock
from petals.errors import ClockWrong, PetalsError
from petals.logs import get_logger
from petals.swarm.address import Address
from petals.swarm.background import BackgroundTasks, gather_bounded
from petals.swarm.config import Engine, EngineParts, NodeConfig
from petals.swarm.directory.directory import Directory
from petals.swarm.identity import Identity, load_or_create_identity, sole_user
from petals.swarm.known_peers import PeerMemory
from petals.swarm.membership import Admission
from petals.swarm.reachability import (
    Reachability,
    check_reachability,
    choose_relays,
    node_service,
)
from petals.swarm.rpc.channel import Channel
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL, RpcParts, RpcServer, Service, open_channel
from petals.swarm.rpc.receive_buffer import Budget
from petals.swarm.transport import OPEN_TIMEOUT_SECONDS, Transport
from petals.types import PeerId
from petals.wire.handshake import DialBack, DialedBack
from petals.wire.services import NODE_SERVICE

logger = get_logger(__name__)

_REMEMBER_SECONDS = 60.0
"""Period of writing the addresses of members to disk."""

MAX_JOIN_SKEW_SECONDS = 30.0
"""Most by which a member's clock may differ from the median of its initial peers. A server's record
lives 60 s and is renewed after 20 s: with more, it would count as expired for a part of the time.
"""

_MAX_MEASURED = 16
"""Members that are measured when relays are chosen; calls to members at the same time."""


class SwarmNode:
    """A member of a swarm. Use it as an async context manager.

    Raises BootstrapFailed on entering if no initial peer answers within about five seconds,
    ClockWrong if this machine's clock is wrong, ConfigError for an unusable identity file or
    address, or an identity that another process uses.
    """

    def __init__(
        self, config: NodeConfig, *, engine: Engine | None = None, clock: Clock | None = None
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        path = config.identity_path
        self.identity = Identity.generate() if path is None else load_or_create_identity(path)
        self.peer_id: PeerId = self.identity.peer_id
        self.admission = Admission(self.peer_id, config.swarm_key)
        self.background = BackgroundTasks()
        self.transport: Transport = (engine or _libp2p)(
            EngineParts(
                config=config,
                identity=self.identity,
                admission=self.admission,
                clock=self.clock,
            )
        )
        limits = config.limits
        self._parts = RpcParts(
            admission=self.admission,
            limits=limits,
            budget=Budget(limits.max_inflight_bytes, limits.max_inflight_bytes_per_peer),
            clock=self.clock,
            agent=config.agent,
        )
        self._server = RpcServer(self._parts)
        self.directory = Directory(self.transport, self.identity, self.clock)
        self._held = ExitStack()
        self._memory: PeerMemory | None = None
        if config.peer_memory is not None and config.initial_peers:
            self._memory = PeerMemory(config.peer_memory, config.initial_peers, config.swarm_key)

    async def __aenter__(self) -> "SwarmNode":
        if self.config.identity_path is not None:
            self._held.enter_context(sole_user(self.config.identity_path))
        self.serve(NODE_SERVICE, node_service(self.transport, self.clock))
        self.transport.on_restart(self._after_restart)
        try:
            initial = await self.transport.start(self._memory.read() if self._memory else ())
            await self.transport.serve(STREAM_PROTOCOL, self._server.handle)
            await self.transport.join(await self._greet(initial))
            self.background.start(self._remember_peers(), "remembering peers")
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every stream and leave. Safe to call twice."""
        self._remember()
        await self.background.close()
        await self._server.close()
        await self.transport.close()
        self._held.close()

    async def addresses(self) -> tuple[str, ...]:
        """Multiaddresses that others can join by."""
        return await self.transport.addresses()

    def serve(self, name: str, service: Service) -> None:
        """Offer a service; see ``rpc.Service`` and ``rpc.answering``."""
        self._server.add(name, service)

    async def open_channel(
        self, peer: PeerId, service: str, timeout: float = OPEN_TIMEOUT_SECONDS
    ) -> Channel:
        """An admitted channel to a peer's service.

        Raises PeerUnreachable, PeerTimeout, AdmissionDenied, VersionMismatch, NotSupported,
        PeerBusy.
        """
        return await open_channel(self._parts, self.transport, peer, service, timeout)

    async def ping(self, peer: PeerId, timeout: float = OPEN_TIMEOUT_SECONDS) -> float:
        """Round-trip time (s) to a peer. Raises what ``open_channel`` raises."""
        async with await self.open_channel(peer, NODE_SERVICE, timeout) as channel:
            return await channel.ping(timeout)

    async def clock_skew(self, peer: PeerId) -> float:
        """How far (s) the peer's wall clock is ahead of this one; the directory warns if it is
        large.
        """
        async with await self.open_channel(peer, NODE_SERVICE) as channel:
            before = self.clock.now()
            answer, _ = await channel.request(
                DialBack(addresses=()), expect=DialedBack, timeout=OPEN_TIMEOUT_SECONDS
            )
            skew = answer.wall_clock_seconds - (before + self.clock.now()) / 2
        self.directory.note_skew(peer, skew)
        return skew

    async def check_reachability(self, peers: Sequence[PeerId] = ()) -> Reachability:
        """Ask peers (by default those with an open connection) whether they can dial this one."""
        asked = list(peers) or sorted(await self.transport.peers())
        return await check_reachability(self.open_channel, asked, await self.addresses())

    async def become_reachable(self, members: Iterable[PeerId] = ()) -> bool:
        """Use relays if others cannot dial this peer, as ``config.relay`` says. True if relays are
        used now; all streams are lost then.

        The nearest of ``members`` and of the connected peers become the relays.
        """
        relay = self.config.relay
        if relay is None:
            found = await self.check_reachability()
            if found.reached is not False:
                return False
            logger.warning(found.advice)
            relay = not self.config.announce_maddrs
        if not relay:
            return False
        peers = dict.fromkeys([*await self.transport.peers(), *members])
        peers.pop(self.peer_id, None)
        ways = await gather_bounded(
            [partial(self._way_to, peer) for peer in list(peers)[:_MAX_MEASURED]], _MAX_MEASURED
        )
        relays = choose_relays(way for way in ways if way is not None)
        if not relays:
            logger.warning("There is no member that this peer could be reached through.")
            return False
        logger.info("to be reached through %s", ", ".join(relays))
        await self.transport.use_relays(relays)
        return True

    async def _way_to(self, peer: PeerId) -> tuple[Address, float] | None:
        """The address at which a peer is seen, and the round trip in seconds; None if it does not
        answer.
        """
        try:
            async with await self.open_channel(peer, NODE_SERVICE) as channel:
                seconds = await channel.ping(OPEN_TIMEOUT_SECONDS)
                return channel.address.with_peer(peer), seconds
        except PetalsError:
            return None

    async def _greet(self, peers: Sequence[PeerId]) -> list[PeerId]:
        """The initial peers that admit this one. If none does, raises the first one's reason;
        ClockWrong if most of them have another time.
        """

        async def skew_of(peer: PeerId) -> float | PetalsError:
            try:
                return await self.clock_skew(peer)
            except PetalsError as error:
                return error

        answers = await gather_bounded([partial(skew_of, peer) for peer in peers], _MAX_MEASURED)
        skews = {peer: skew for peer, skew in zip(peers, answers) if isinstance(skew, float)}
        refusals = [answer for answer in answers if isinstance(answer, PetalsError)]
        if not skews and refusals:
            raise refusals[0]
        if not skews:
            return []
        ahead = median(skews.values())
        if abs(ahead) > MAX_JOIN_SKEW_SECONDS:
            side = "behind" if ahead > 0 else "ahead of"
            raise ClockWrong(
                f"The clock of this machine is {abs(ahead):.0f} s {side} those of the swarm "
                f"({len(skews)} of its members were asked)."
            )
        return list(skews)

    async def _remember_peers(self) -> None:
        while self._memory is not None:
            await self.clock.sleep(_REMEMBER_SECONDS)
            self._remember()

    def _remember(self) -> None:
        known = self.transport.known()
        if self._memory is not None and known:
            self._memory.add(known)

    def _after_restart(self) -> None:
        self.background.start(self.directory.store_again(), "announcing again")


def _libp2p(parts: EngineParts) -> Transport:
    from petals.swarm.libp2p.engine import Libp2pTransport  # the engine costs seconds to import

    return Libp2pTransport(parts)
