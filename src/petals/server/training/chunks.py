"""How a pass is cut into units: some of its rows through some of its blocks.

A unit is as large as the room it is given, at least one row through one block. Rows that begin
together stay together through all blocks, so that their states need no sorting. Values in, values
out: no torch, no clock, no thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD_WORTH = 1
BACKWARD_WORTH = 2
"""A token on its way back takes about twice as long as on its way there."""

_GOOD_TOKENS = 512
"""So many tokens make matrices worth multiplying; fewer only where even one block is too long."""


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows of a pass that run together.

    Packed, their tokens are [first, last) of the pass.
    """

    rows: range
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        return self.last - self.first


def next_strip(counts: Sequence[int], begun: RowChunk | None, max_tokens: int) -> RowChunk | None:
    """The rows after ``begun``, as many as ``max_tokens`` hold but at least one that has tokens.

    None: there are no more tokens.
    """
    row, first = (begun.rows.stop, begun.last) if begun is not None else (0, 0)
    start, last = row, first
    while row < len(counts) and (last == first or last + counts[row] - first <= max_tokens):
        last += counts[row]
        row += 1
    return RowChunk(range(start, row), first, last) if last > first else None


def tokens_of_strip(room: int, num_blocks: int) -> int:
    """How many tokens a strip should have, if a unit may be worth ``room`` tokens through all of
    ``num_blocks`` blocks.
    """
    return max(room, min(_GOOD_TOKENS, room * num_blocks))


def blocks_within(room: int, num_tokens: int, cost_tokens: int, num_blocks: int) -> int:
    """Through how many blocks ``num_tokens`` may go at once, at least one."""
    return max(1, room * num_blocks // max(1, num_tokens * cost_tokens))


def worth_of(num_tokens: int, blocks: int, cost_tokens: int, num_blocks: int) -> int:
    """What a unit is worth: the tokens through all ``num_blocks`` that take as long."""
    return max(1, -(-num_tokens * blocks * cost_tokens // num_blocks))
