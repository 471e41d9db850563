"""Whether other peers can reach this one: ask them to dial back, and choose relays.

A peer dials back only to the host at which it sees the asking peer, and at a bounded rate, so that
no peer can direct it at a third party. Must not know models.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from petals.clock import Clock
from petals.errors import PeerBusy, PetalsError, ProtocolError
from petals.swarm.address import Address
from petals.swarm.background import gather_bounded
from petals.swarm.rpc.channel import Channel
from petals.swarm.rpc.dispatcher import Service
from petals.swarm.transport import Transport
from petals.types import PeerId
from petals.wire.handshake import DialBack, DialedBack
from petals.wire.services import NODE_SERVICE

_PROBE_TIMEOUT_SECONDS = 3.0
"""Time limit for dialling one address back."""

_ASK_TIMEOUT_SECONDS = 10.0
"""Time limit for a peer's answer whether it could dial back."""

_MAX_ASKED = 3
"""Peers that are asked to dial back."""

_MAX_RELAYS = 3
"""Members through which a hidden peer is reached."""

_MAX_DIALLED = 4
"""Addresses that are dialled back for one request."""

_DIALS_PER_HOST, _DIALS_IN_ALL, _PER_SECONDS = 8, 64, 60.0
"""Dials back within ``_PER_SECONDS``: to one host, and in all."""


@dataclass(frozen=True, slots=True)
class Reachability:
    """What the peers reported. ``reached`` is None if no peer could be asked."""

    reached: bool | None
    num_asked: int
    advice: str


class _Allowance:
    """Rate limit of dials back, per host and in all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._dials: deque[tuple[float, str]] = deque()

    def take(self, host: str) -> None:
        """Count one dial to ``host``. Raises PeerBusy if the limit is reached."""
        now = self._clock.monotonic()
        while self._dials and self._dials[0][0] <= now - _PER_SECONDS:
            self._dials.popleft()
        of_host = sum(dialled == host for _, dialled in self._dials)
        if of_host >= _DIALS_PER_HOST or len(self._dials) >= _DIALS_IN_ALL:
            raise PeerBusy("This peer has dialled back often enough.", hint="Ask in a minute.")
        self._dials.append((now, host))


def node_service(transport: Transport, clock: Clock) -> Service:
    """The service that every peer offers: dialling back, and the wall clock."""
    allowance = _Allowance(clock)

    async def serve(channel: Channel) -> None:
        seen_at = channel.address.seen_host
        while True:
            message, _ = await channel.receive()
            if not isinstance(message, DialBack):
                raise ProtocolError("Only DialBack can be asked of this service.")
            own = [a for a in message.addresses if seen_at and Address(a).seen_host == seen_at]
            reached = False
            for address in list(dict.fromkeys(own))[:_MAX_DIALLED]:
                allowance.take(seen_at)
                reached = await transport.probe(address, _PROBE_TIMEOUT_SECONDS)
                if reached:
                    break
            await channel.send(DialedBack(reached=reached, wall_clock_seconds=clock.now()))

    return serve


async def check_reachability(
    open_channel: Callable[[PeerId, str], Awaitable[Channel]],
    peers: Sequence[PeerId],
    addresses: Sequence[str],
) -> Reachability:
    """Ask up to three of ``peers`` to dial ``addresses`` of this peer. One success is enough."""

    async def ask(peer: PeerId) -> bool | None:
        try:
            async with await open_channel(peer, NODE_SERVICE) as channel:
                answer, _ = await channel.request(
                    DialBack(addresses=tuple(addresses[:16])),
                    expect=DialedBack,
                    timeout=_ASK_TIMEOUT_SECONDS,
                )
                return answer.reached
        except PetalsError:
            return None

    answers = await gather_bounded([partial(ask, peer) for peer in peers[:_MAX_ASKED]], _MAX_ASKED)
    num_asked = sum(answer is not None for answer in answers)
    if any(answers):
        return Reachability(True, num_asked, "Other peers can reach this one directly.")
    if num_asked == 0:
        return Reachability(None, 0, "No other peer could be asked; join a swarm to find out.")
    return Reachability(
        False,
        num_asked,
        "Other peers cannot reach this one directly. Forward its port in the router or open it in "
        "the firewall (--port PORT fixes the number); otherwise its traffic goes through relays, "
        "which is slower.",
    )


def choose_relays(ways: Iterable[tuple[Address, float]]) -> tuple[str, ...]:
    """Up to three members to be reached through: the nearest that can be dialled directly.

    ``ways`` are (address of a member, round trip in seconds).
    """
    direct = sorted((seconds, str(way)) for way, seconds in ways if not way.is_relayed)
    return tuple(way for _, way in direct[:_MAX_RELAYS])
