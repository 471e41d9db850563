"""How a pass is cut into parts that fit a budget: some of its rows through some of its blocks.

Costs are in tokens: the number of tokens whose forward through all blocks of the span takes as
long. A part costs about its budget, but is at least one row through one block. Rows that start
together stay together through all blocks, so that their activations need no sorting. Values in,
values out: no torch, no clock, no thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD_COST = 1
BACKWARD_COST = 2
"""Cost of a token in either direction; gradients of inputs and weights take two products for one.
"""

_EFFICIENT_TOKENS = 512
"""Tokens from which on larger matrix products are not faster per token."""


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows of a pass that run together; packed, their tokens are [first, last)."""

    rows: range
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        return self.last - self.first


def next_chunk(counts: Sequence[int], done: RowChunk | None, max_tokens: int) -> RowChunk | None:
    """The rows behind ``done``: as many as ``max_tokens`` hold, but at least one that has tokens.

    None if no tokens are left.
    """
    row, first = (done.rows.stop, done.last) if done is not None else (0, 0)
    start, last = row, first
    while row < len(counts) and (last == first or last + counts[row] - first <= max_tokens):
        last += counts[row]
        row += 1
    return RowChunk(range(start, row), first, last) if last > first else None


def chunk_tokens(budget_tokens: int, num_blocks: int) -> int:
    """Tokens a chunk should have, if a part may cost ``budget_tokens`` in a span of ``num_blocks``.

    A chunk may pass block by block, each a part of its own, so it may be larger than the budget: as
    large as is efficient, unless its way through a single block would exceed the budget.
    """
    return max(budget_tokens, min(_EFFICIENT_TOKENS, budget_tokens * num_blocks))


def blocks_within(budget_tokens: int, num_tokens: int, cost: int, num_blocks: int) -> int:
    """Blocks that ``num_tokens`` may pass within the budget, at ``cost`` per token; at least 1."""
    return max(1, budget_tokens * num_blocks // max(1, num_tokens * cost))


def cost_tokens(num_tokens: int, blocks: int, cost: int, num_blocks: int) -> int:
    """Cost of ``num_tokens`` through ``blocks`` of a span of ``num_blocks``, at ``cost`` per token.

    Rounded up, at least 1.
    """
    return max(1, -(-num_tokens * blocks * cost // num_blocks))
