"""States of the recurrent blocks (linear attention, convolutions) of one row, with rollback.

Keys and values can be cut at any position; a recurrent state holds all tokens in one tensor and
cannot. A row therefore keeps snapshots of the states before its latest steps, and the inputs [H] of
all tokens. A rollback restores the nearest snapshot at or before the position and feeds the inputs
between the two through the blocks again, which gives exactly the state of that position. Most
rollbacks (speculation, a repeated step) are to a snapshot and feed nothing. Knows no sessions and
no budgets.
"""

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.cache_utils import LinearAttentionLayer

States = dict[int, LinearAttentionLayer]
"""The state of each recurrent block, by its number in the whole model."""


class RecurrentRow:
    """The states of one row after ``position`` tokens."""

    MAX_SNAPSHOTS: ClassVar[int] = 4
    """Snapshots kept at most; each takes the memory of the states once more."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.position = 0
        self.states: States = {}
        self._snapshots: deque[tuple[int, States]] = deque(maxlen=self.MAX_SNAPSHOTS)
        self._inputs: torch.Tensor | None = None
        self._rope_lengths: list[int] = []
        """Of each token of the inputs."""

    def state(self, block: int, num_states: int) -> LinearAttentionLayer:
        """The state of ``block``, empty before its first token."""
        if block not in self.states:
            self.states[block] = LinearAttentionLayer(number_of_states=num_states)
        return self.states[block]

    def rewind(self, start: int) -> tuple[torch.Tensor, tuple[int, ...]] | None:
        """Go back to a state from which feeding the returned inputs [n, H] leads to ``start``.

        None: the state is that of ``start``. Otherwise the caller feeds the inputs with their rope
        lengths through the blocks, beginning at ``position``, and passes them to ``advance``.
        """
        if start == self.position:
            return None
        while self._snapshots and self._snapshots[-1][0] > start:
            self._snapshots.pop()
        if self._snapshots:
            self.position, states = self._snapshots[-1]
            self.states = _clone(states)
        else:
            self.position, self.states = 0, {}
        if self.position == start or self._inputs is None:
            return None
        lengths = tuple(self._rope_lengths[self.position : start])
        return self._inputs[self.position : start].clone(), lengths

    def snapshot(self) -> None:
        """Keep a copy of the states at ``position``; call it before a step."""
        if not self._snapshots or self._snapshots[-1][0] != self.position:
            self._snapshots.append((self.position, _clone(self.states)))

    def advance(self, inputs: torch.Tensor, rope_lengths: Sequence[int]) -> None:
        """Record that ``inputs`` [n, H] have been fed through the blocks after ``position``."""
        end = self.position + inputs.shape[0]
        buffer = self._inputs
        if buffer is None or end > buffer.shape[0]:
            grown = inputs.new_empty((min(max(64, 2 * end), self.max_length), inputs.shape[1]))
            if buffer is not None:
                grown[: self.position] = buffer[: self.position]
            buffer = self._inputs = grown
        buffer[self.position : end] = inputs
        self._rope_lengths[self.position :] = rope_lengths
        self.position = end

    def fork(self, max_length: int) -> "RecurrentRow":
        """An independent copy, snapshots and inputs included, with a limit of its own."""
        copied = RecurrentRow(max_length)
        copied.position, copied.states = self.position, _clone(self.states)
        copied._snapshots.extend((position, _clone(states)) for position, states in self._snapshots)
        copied._inputs = None if self._inputs is None else self._inputs[:max_length].clone()
        copied._rope_lengths = list(self._rope_lengths)
        return copied

    @property
    def num_bytes(self) -> int:
        """Bytes of memory taken now, snapshots and inputs included."""
        held = [self.states, *(states for _, states in self._snapshots)]
        inputs = 0 if self._inputs is None else self._inputs.nbytes
        return inputs + sum(states_bytes(states) for states in held)


def states_bytes(states: States) -> int:
    """Bytes of all tensors in ``states``."""
    return sum(
        tensor.nbytes
        for layer in states.values()
        for kept in (layer.conv_states, layer.recurrent_states)
        for tensor in kept.values()
        if tensor is not None
    )


def _clone(states: States) -> States:
    # transformers updates states in place, so every tensor is cloned.
    copies: States = {}
    for block, layer in states.items():
        copied = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(copied, name, {key: _clone_value(item) for key, item in value.items()})
        copies[block] = copied
    return copies


def _clone_value(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
