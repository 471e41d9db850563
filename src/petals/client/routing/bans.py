"""Whom a client avoids, for how long and why. Knows peers and seconds; decides no route."""

from dataclasses import dataclass
from enum import IntEnum

from petals.types import PeerId


class Cause(IntEnum):
    """Why a server is avoided, the worst last: it was left as too slow; it did not answer a call,
    but held nothing of ours; it failed us.
    """

    SLOW = 0
    UNANSWERED = 1
    FAILED = 2


@dataclass(slots=True)
class Ban:
    """Until when (monotonic seconds) a server is avoided, for how long in all, and why."""

    until: float
    seconds: float
    cause: Cause


class Bans:
    """Who failed lately. A ban doubles if the next failure follows soon, else it is forgotten."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._bans: dict[PeerId, Ban] = {}

    def add(
        self, peer: PeerId, now: float, factor: float = 1.0, cause: Cause = Cause.FAILED
    ) -> Ban:
        """The peer failed at ``now``. What fails during a ban began before it, and adds nothing."""
        known = self._bans.get(peer)
        seconds = self._first_seconds * factor
        if known is not None and now < known.until:
            seconds = max(seconds, known.seconds)
            cause = max(cause, known.cause)
        elif known is not None and now < known.until + known.seconds:
            seconds = max(seconds, 2 * known.seconds)
        seconds = min(seconds, self._max_seconds)
        self._bans[peer] = Ban(now + seconds, seconds, cause)
        return self._bans[peer]

    def lift(self, peer: PeerId) -> None:
        """The peer serves again."""
        self._bans.pop(peer, None)

    def at(self, now: float, least: Cause = Cause.SLOW) -> frozenset[PeerId]:
        """Those to avoid now, for this cause or a worse one."""
        bans = self._bans.items()
        return frozenset(peer for peer, ban in bans if now < ban.until and ban.cause >= least)
