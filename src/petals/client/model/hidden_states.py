"""``output_hidden_states``: which blocks' outputs a call asks for, and the tuple it gets.

As in transformers, entry 0 is what enters the first block, entry i what block i - 1 has put out,
and the last entry has been through the model's final norm. Knows no servers and no model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

ENTRY = -1
"""Stands for the block before the first one: what it would have put out enters that."""


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The entries that a call asks for, of ``num_blocks`` + 1 in all."""

    entries: frozenset[int]
    num_blocks: int

    @classmethod
    def asked_by(cls, call: dict[str, Any], config: Any, num_blocks: int) -> "HiddenStates | None":
        """Read from the arguments of a forward, else from the config: a flag, an index or several.

        None if nothing is asked for. Indices out of range select nothing.
        """
        asked = call.get("output_hidden_states")
        if asked is None:
            asked = getattr(config, "output_hidden_states", None)
        if not asked:  # a bare 0 asks for nothing, as in transformers
            return None
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
