"""Rows of hidden states that a session may need again, and the memory budget of all of them.

Knows tensors; knows no peers.
"""

from collections.abc import Hashable


class LogBudget:
    """Bytes that the inputs of all sessions may take together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: dict[Hashable, int] = {}

    def book(self, session: Hashable, num_bytes: int) -> bool:
        """``session`` now holds ``num_bytes``. False if that is too much: it must drop them."""
        self.forget(session)
        if sum(self._held.values()) + num_bytes > self._max_bytes:
            return False
        self._held[session] = num_bytes
        return True

    def forget(self, session: Hashable) -> None:
        """It holds nothing any more. Idempotent."""
        self._held.pop(session, None)
