"""How long a route's steps take, from those it has done: how long silence means nothing.

Plain arithmetic; knows no clock and no servers.
"""

from collections import deque
from statistics import median

_REMEMBERED = 32
_PATIENCE = 4.0

_TRIPS_PER_REDIAL = 10.0
"""A connection, its encryption, a stream and a greeting, and some to spare."""
_REDIAL_SECONDS = (0.3, 1.0)


def redial_seconds(link_seconds: float) -> float:
    """How long a peer whose stream broke may take to be there again, when a trip to it takes
    ``link_seconds``. One that died refuses at once, or else says nothing: others wait for us then.
    """
    shortest, longest = _REDIAL_SECONDS
    return min(longest, max(shortest, _TRIPS_PER_REDIAL * link_seconds))


class LatencyEstimate:
    """The latest steps: (tokens, seconds)."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of ``num_tokens`` took ``seconds``."""
        self._steps.append((num_tokens, seconds))

    def timeout_seconds(self, num_tokens: int) -> float | None:
        """Four times what so many tokens should take; None before anything was measured.

        A step that is longer than those measured takes longer in proportion, a shorter one as long.
        """
        if not self._steps:
            return None
        return _PATIENCE * median(
            seconds * max(1.0, num_tokens / max(1, measured)) for measured, seconds in self._steps
        )
