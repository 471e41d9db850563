"""``output_hidden_states``: which blocks' outputs a call asks for, and the tuple it gets.

As in transformers, entry 0 is the input of the first block, entry i the output of block i - 1, and
the last entry the output of the model's final norm. Knows no servers and no model by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

ENTRY = -1
"""Stands for the block before the first one, whose output would be the first one's input."""


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The entries that a call asks for, of ``num_blocks`` + 1 in all."""

    entries: frozenset[int]
    num_blocks: int

    @classmethod
    def of(cls, asked: bool | int | Sequence[int], num_blocks: int) -> "HiddenStates":
        """From True, an index or several; indices out of range select nothing."""
        if asked is True:
            return cls(frozenset(range(num_blocks + 1)), num_blocks)
        given = [asked] if isinstance(asked, int) else asked
        total = num_blocks + 1
        return cls(frozenset(i % total for i in given if -total <= i < total), num_blocks)

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks whose outputs are needed, ENTRY among them."""
        return tuple(sorted(entry - 1 for entry in self.entries if entry < self.num_blocks))

    def joined_to(self, output: ModelOutput, tapped: Mapping[int, Tensor | None]) -> ModelOutput:
        """The model's output with its hidden states; entries not asked for are None."""
        states = [tapped.get(entry - 1) for entry in range(self.num_blocks)]
        last = output["last_hidden_state"] if self.num_blocks in self.entries else None
        output["hidden_states"] = (*states, last)
        return output
