"""The servers that a client avoids, until when and why.

Knows peers and seconds; decides no route.
"""

from dataclasses import dataclass
from enum import IntEnum

from petals.types import PeerId


class Cause(IntEnum):
    """Why a server is avoided, the worst cause last.

    SLOW: a session replaced it as a straggler, or left it as hung. UNANSWERED: it did not answer a
    request, but held no state of this client. FAILED: it failed while it served this client.
    """

    SLOW = 0
    UNANSWERED = 1
    FAILED = 2


@dataclass(slots=True)
class Ban:
    """A ban: its end (monotonic seconds), its length (s) and its cause."""

    until: float
    seconds: float
    cause: Cause


class Bans:
    """The bans of one client.

    A first ban lasts ``first_seconds``. If the next failure follows within the length of the ban
    after its end, the next ban is twice as long; a later failure counts as the first.
    """

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._bans: dict[PeerId, Ban] = {}

    def add(
        self, peer: PeerId, now: float, factor: float = 1.0, cause: Cause = Cause.FAILED
    ) -> Ban:
        """Ban ``peer``, which failed at ``now``, for ``first_seconds * factor`` or longer.

        A failure during a ban does not double it: the request was sent before the ban began.
        """
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
        """End the ban of ``peer``, which has served a request."""
        self._bans.pop(peer, None)

    def at(self, now: float, least: Cause = Cause.SLOW) -> frozenset[PeerId]:
        """The servers that are banned at ``now`` for the cause ``least`` or a worse one."""
        bans = self._bans.items()
        return frozenset(peer for peer, ban in bans if now < ban.until and ban.cause >= least)
