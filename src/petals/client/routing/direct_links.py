"""Which hand-overs between servers work and how, and the arcs that a route is cut into by them.

An edge that failed goes through the client for a while and is then tried again. Plain values and
arithmetic: time comes in as a value. Knows no servers but by name.
"""

from collections.abc import Sequence

from petals.types import PeerId


class DirectLinks:
    """The edges that lately did not work; all others are taken to be direct."""

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._closed_until: dict[tuple[PeerId, PeerId], float] = {}
        self._relayed: set[tuple[PeerId, PeerId]] = set()

    def close(self, near: PeerId, far: PeerId, now: float) -> None:
        """``near`` could not hand over to ``far``."""
        self._closed_until[near, far] = now + self._retry_seconds

    def is_direct(self, near: PeerId, far: PeerId, now: float) -> bool:
        """True if states may go from one to the other. Nobody hands over to himself."""
        return near != far and now >= self._closed_until.get((near, far), 0.0)

    def note_way(self, near: PeerId, far: PeerId, is_relayed: bool) -> None:
        """States have come from ``near`` to ``far``, through a relay or directly."""
        if is_relayed:
            self._relayed.add((near, far))
        else:
            self._relayed.discard((near, far))

    def is_relayed(self, near: PeerId, far: PeerId) -> bool:
        """True if what came last from one to the other came through a relay."""
        return (near, far) in self._relayed

    def arc_end(self, route: Sequence[PeerId], start: int, now: float) -> int:
        """Where the arc from hop ``start`` ends: the first hop that is not handed to directly."""
        end = start + 1
        while end < len(route) and self.is_direct(route[end - 1], route[end], now):
            end += 1
        return end
