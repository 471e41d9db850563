"""Which servers can forward hidden states to each other directly, as far as a client knows.

A route is cut into direct runs: consecutive hops that forward from one to the next. Between two
runs the states pass through the client. A link that failed is tried again after some seconds. Pure:
time is an argument. Knows no network.
"""

from collections.abc import Sequence

from petals.types import PeerId


class DirectLinks:
    """The links between servers that failed lately; all others are assumed to work.

    A link is directed: ``near`` forwards to ``far``.
    """

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._closed_until: dict[tuple[PeerId, PeerId], float] = {}
        self._relayed: set[tuple[PeerId, PeerId]] = set()

    def close(self, near: PeerId, far: PeerId, now: float) -> None:
        """Record that ``near`` could not forward to ``far``."""
        self._closed_until[near, far] = now + self._retry_seconds

    def is_direct(self, near: PeerId, far: PeerId, now: float) -> bool:
        """Whether ``near`` may forward to ``far`` now.

        False for one server in two hops in a row: servers do not forward to themselves.
        """
        return near != far and now >= self._closed_until.get((near, far), 0.0)

    def note_way(self, near: PeerId, far: PeerId, is_relayed: bool) -> None:
        """Record whether states from ``near`` reached ``far`` through a relay."""
        if is_relayed:
            self._relayed.add((near, far))
        else:
            self._relayed.discard((near, far))

    def is_relayed(self, near: PeerId, far: PeerId) -> bool:
        """Whether the last states from ``near`` reached ``far`` through a relay."""
        return (near, far) in self._relayed

    def run_end(self, route: Sequence[PeerId], start: int, now: float) -> int:
        """End (exclusive) of the direct run that begins at hop ``start`` of ``route``."""
        end = start + 1
        while end < len(route) and self.is_direct(route[end - 1], route[end], now):
            end += 1
        return end
