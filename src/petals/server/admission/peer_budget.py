"""Bytes of states that wait or run on this server, counted per peer.

Knows no messages.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from petals.errors import (
    PeerBusy,
)
from petals.types import PeerId


class ByteAllowance:
    """Bytes of states that wait or run here, per peer."""

    def __init__(self, max_bytes_per_peer: int) -> None:
        self._max_bytes = max_bytes_per_peer
        self._used: Counter[PeerId] = Counter()

    @property
    def used_bytes(self) -> int:
        """Bytes of all peers."""
        return self._used.total()

    @contextmanager
    def hold(self, peer: PeerId, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` while the block runs. Raises PeerBusy if it would be too much."""
        self.reserve(peer, num_bytes)
        try:
            yield
        finally:
            self.release(peer, num_bytes)

    def reserve(self, peer: PeerId, num_bytes: int) -> None:
        """Count ``num_bytes`` until ``release``. Raises PeerBusy if it would be too much."""
        if self._used[peer] + num_bytes > self._max_bytes:
            raise PeerBusy(
                "Too many states of this client are being computed.", hint="Wait for answers first."
            )
        self._used[peer] += num_bytes

    def release(self, peer: PeerId, num_bytes: int) -> None:
        """Give back what was reserved."""
        self._used[peer] -= num_bytes
        if not self._used[peer]:
            del self._used[peer]
