"""The memory that passes keep for their backward: measured, and limited.

The memory of an autograd graph is the sum of the tensors it saves, each storage once, weights not
at all. Only the compute thread uses this module. Knows no peers, no messages and no clock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class ActivationBudget:
    """Bytes of saved activations, at most ``cap_bytes``, and the last measured bytes per token and
    block, from which the size of the next graph is predicted.
    """

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.used_bytes = 0
        self._bytes_per_token = 0.0

    @property
    def free_bytes(self) -> int:
        return self.cap_bytes - self.used_bytes

    def tokens_within(self) -> int:
        """Number of tokens whose graph through one block still fits, by the last measurement.

        Before any measurement one byte per token is assumed, so that the first graph is made.
        """
        free = max(0, self.free_bytes)
        return int(free / self._bytes_per_token) if self._bytes_per_token else free

    def fits(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether the graph of ``num_tokens`` through ``num_blocks`` is expected to fit."""
        return num_tokens * num_blocks <= self.tokens_within()

    def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as used."""
        self.used_bytes += num_bytes

    def take_graph(self, num_bytes: int, num_tokens: int, num_blocks: int) -> None:
        """Count the graph of ``num_tokens`` through ``num_blocks``, and remember its size."""
        self.take(num_bytes)
        self._bytes_per_token = num_bytes / (num_tokens * num_blocks)

    def give_back(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as free again."""
        self.used_bytes -= num_bytes


class Meter:
    """Measures the memory that autograd saves while it is ``running``, but for ``weights``
    (addresses of storages).
    """

    def __init__(self, weights: frozenset[int]) -> None:
        self._weights = weights
        self._saved: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages seen."""
        return sum(self._saved.values())

    def note(self, tensor: Tensor) -> Tensor:
        """Count the storage of ``tensor``, once, and return ``tensor``."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._weights:
            self._saved[address] = storage.nbytes()
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what autograd saves inside."""
        with saved_tensors_hooks(self.note, lambda tensor: tensor):
            yield
