"""Can others reach us? Ask them to dial back, say in words what follows, and choose relays.

A peer dials back only to the address it sees the asker at, and not often, so that nobody can make
it knock at a third party's door. Knows no models.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from petals.clock import Clock
from petals.errors import PeerBusy, PetalsError, ProtocolError
from petals.swarm.rpc.channel import Channel
from petals.swarm.rpc.dispatcher import Service
from petals.swarm.transport import CIRCUIT, Transport
from petals.types import PeerId
from petals.wire.handshake import DialBack, DialedBack

NODE_SERVICE = "node"
"""Every peer offers it: pings, clock, dialling back."""

_PROBE_TIMEOUT_SECONDS = 3.0
_ASK_TIMEOUT_SECONDS = 10.0
_MAX_ASKED = 3
_MAX_RELAYS = 3
_MAX_DIALLED = 4
_DIALS_PER_HOST, _DIALS_IN_ALL, _PER_SECONDS = 8, 64, 60.0


@dataclass(frozen=True, slots=True)
class Reachability:
    """What the peers said. ``reached`` None means that nobody could be asked."""

    reached: bool | None
    num_asked: int
    advice: str


class _Allowance:
    """How often this peer dials back: a few addresses a minute per host, and some in all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._dials: deque[tuple[float, str]] = deque()

    def take(self, host: str) -> None:
        """Raises PeerBusy if there is none left."""
        now = self._clock.monotonic()
        while self._dials and self._dials[0][0] <= now - _PER_SECONDS:
            self._dials.popleft()
        of_host = sum(dialled == host for _, dialled in self._dials)
        if of_host >= _DIALS_PER_HOST or len(self._dials) >= _DIALS_IN_ALL:
            raise PeerBusy("This peer has dialled back often enough.", hint="Ask in a minute.")
        self._dials.append((now, host))


def node_service(transport: Transport, clock: Clock) -> Service:
    """The service every peer offers."""
    allowance = _Allowance(clock)

    async def serve(channel: Channel) -> None:
        seen_at = host_of(channel.remote_address)
        while True:
            message, _ = await channel.receive()
            if not isinstance(message, DialBack):
                raise ProtocolError("Only DialBack can be asked of this service.")
            own = [a for a in message.addresses if seen_at and host_of(a) == seen_at]
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
    """Ask up to three of ``peers`` to dial ``addresses`` (ours). One success is enough."""

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

    answers = await asyncio.gather(*map(ask, peers[:_MAX_ASKED]))
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


def choose_relays(ways: Iterable[tuple[str, float]]) -> tuple[str, ...]:
    """Up to three members to be reached through: (address that leads there, round trip in seconds)
    of many -> the nearest that are not relayed themselves.
    """
    direct = sorted((seconds, way) for way, seconds in ways if way and CIRCUIT not in way)
    return tuple(way for _, way in direct[:_MAX_RELAYS])


def host_of(address: str) -> str:
    """``/ip4/1.2.3.4/tcp/5/p2p/Qm…`` -> ``/ip4/1.2.3.4``; empty for relayed addresses (their host
    is the relay's).
    """
    if CIRCUIT in address:
        return ""
    return "/".join(address.split("/")[:3])
