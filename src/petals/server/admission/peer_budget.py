"""A budget for each peer: bytes of its states that wait or run on this server.

Knows no messages.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from petals.errors import PeerBusy
from petals.types import PeerId


class PeerByteBudget:
    """Bytes of states in use by each peer, at most ``max_bytes_per_peer``."""

    def __init__(self, max_bytes_per_peer: int) -> None:
        self._max_bytes = max_bytes_per_peer
        self._used: Counter[PeerId] = Counter()

    @property
    def used_bytes(self) -> int:
        """Bytes of all peers."""
        return self._used.total()

    @contextmanager
    def hold(self, peer: PeerId, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` until the context ends. Raises PeerBusy beyond the budget."""
        self.reserve(peer, num_bytes)
        try:
            yield
        finally:
            self.release(peer, num_bytes)

    def reserve(self, peer: PeerId, num_bytes: int) -> None:
        """Count ``num_bytes`` until ``release``. Raises PeerBusy beyond the budget."""
        if self._used[peer] + num_bytes > self._max_bytes:
            raise PeerBusy(
                "Too many states of this client are being computed.", hint="Wait for answers first."
            )
        self._used[peer] += num_bytes

    def release(self, peer: PeerId, num_bytes: int) -> None:
        """Count ``num_bytes`` as free again."""
        self._used[peer] -= num_bytes
        if not self._used[peer]:
            del self._used[peer]
