"""States of recurrent blocks (linear attention, convolutions) of one row, and the way back.

A recurrent state cannot be cut at a position. A row therefore keeps snapshots of the last steps
and the inputs of all tokens, so that any rollback is answered exactly: restore the nearest earlier
snapshot and feed again what lies between. Knows no sessions and no budgets.
"""

import copy
from collections import deque
from typing import Any, ClassVar

import torch
from transformers.cache_utils import LinearAttentionLayer

States = dict[int, LinearAttentionLayer]


class RecurrentRow:
    """States by block (absolute), valid after ``position`` tokens."""

    MAX_SNAPSHOTS: ClassVar[int] = 4

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.position = 0
        self.states: States = {}
        self._snapshots: deque[tuple[int, States]] = deque(maxlen=self.MAX_SNAPSHOTS)
        self._inputs: torch.Tensor | None = None

    def state(self, block: int, num_states: int) -> LinearAttentionLayer:
        """The state of one block, empty at first."""
        if block not in self.states:
            self.states[block] = LinearAttentionLayer(number_of_states=num_states)
        return self.states[block]

    def rewind(self, start: int) -> torch.Tensor | None:
        """Go back so that feeding the returned inputs [n, H] (None: nothing) leads to ``start``."""
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
        return self._inputs[self.position : start].clone()

    def snapshot(self) -> None:
        """Remember the state before a step."""
        if not self._snapshots or self._snapshots[-1][0] != self.position:
            self._snapshots.append((self.position, _clone(self.states)))

    def advance(self, inputs: torch.Tensor) -> None:
        """A step has fed ``inputs`` [n, H] through the blocks."""
        end = self.position + inputs.shape[0]
        buffer = self._inputs
        if buffer is None or end > buffer.shape[0]:
            grown = inputs.new_empty((min(max(64, 2 * end), self.max_length), inputs.shape[1]))
            if buffer is not None:
                grown[: self.position] = buffer[: self.position]
            buffer = self._inputs = grown
        buffer[self.position : end] = inputs
        self.position = end

    def fork(self) -> "RecurrentRow":
        """An independent copy."""
        twin = RecurrentRow(self.max_length)
        twin.position, twin.states = self.position, _clone(self.states)
        twin._snapshots.extend((position, _clone(states)) for position, states in self._snapshots)
        twin._inputs = None if self._inputs is None else self._inputs.clone()
        return twin

    @property
    def num_bytes(self) -> int:
        """Memory held now, snapshots and inputs included."""
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
    twins: States = {}
    for block, layer in states.items():
        twin = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(twin, name, {key: _clone_value(item) for key, item in value.items()})
        twins[block] = twin
    return twins


def _clone_value(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
