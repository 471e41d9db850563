"""Memory for the way back: what autograd keeps of passes, counted and capped.

A graph is counted by the tensors it saves, each storage once, weights not at all. Everything here
belongs to the compute thread. Knows no peers beyond their names, no messages and no clock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class ActivationBudget:
    """Bytes that graphs may take in all, and what a token costs in one block, as seen so far."""

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.used_bytes = 0
        self._bytes_per_token = 0.0

    def tokens_within(self) -> int:
        """How many tokens may still pass one block, as far as is known."""
        free = max(0, self.free_bytes)
        return int(free / self._bytes_per_token) if self._bytes_per_token else free

    def has_room(self, num_tokens: int, num_blocks: int) -> bool:
        """Would the graph of so many tokens through so many blocks fit?"""
        return num_tokens * num_blocks <= self.tokens_within()

    @property
    def free_bytes(self) -> int:
        return self.cap_bytes - self.used_bytes

    def take(self, num_bytes: int) -> None:
        """So much is held beside graphs."""
        self.used_bytes += num_bytes

    def take_graph(self, num_bytes: int, num_tokens: int, num_blocks: int) -> None:
        """A graph has been made."""
        self.take(num_bytes)
        self._bytes_per_token = num_bytes / (num_tokens * num_blocks)

    def give_back(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


class Meter:
    """Counts what autograd saves while it is active."""

    def __init__(self, weights: frozenset[int]) -> None:
        self._weights = weights
        self._saved: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._saved.values())

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._weights:
            self._saved[address] = storage.nbytes()
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        with saved_tensors_hooks(self.note, lambda tensor: tensor):
            yield
