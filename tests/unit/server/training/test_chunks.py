"""How passes are cut: every token once, in order, within the budget where one row allows it."""

from hypothesis import given
from hypothesis import strategies as some

from petals.server.training.chunks import (
    RowChunk,
    blocks_within,
    chunk_tokens,
    cost_tokens,
    next_chunk,
)


def chunks_of(counts: list[int], max_tokens: int) -> list[RowChunk]:
    found: list[RowChunk] = []
    while (chunk := next_chunk(counts, found[-1] if found else None, max_tokens)) is not None:
        found.append(chunk)
    return found


@given(some.lists(some.integers(0, 50), max_size=30), some.integers(0, 80))
def test_chunks_hold_every_token_once(counts: list[int], max_tokens: int) -> None:
    tokens, found = 0, chunks_of(counts, max_tokens)
    for chunk, before in zip(found, [None, *found]):
        assert chunk.first == tokens and chunk.num_tokens > 0
        assert chunk.rows.start == (before.rows.stop if before else 0)
        assert chunk.num_tokens == sum(counts[row] for row in chunk.rows)
        busy = [row for row in chunk.rows if counts[row]]
        assert chunk.num_tokens <= max_tokens or len(busy) == 1
        tokens = chunk.last
    assert tokens == sum(counts)


@given(some.integers(1, 2000), some.integers(1, 100), some.integers(1, 3), some.integers(1, 80))
def test_a_part_costs_no_more_than_its_budget(
    budget_tokens: int, num_tokens: int, cost: int, num_blocks: int
) -> None:
    blocks = blocks_within(budget_tokens, num_tokens, cost, num_blocks)
    assert blocks >= 1
    if blocks > 1:
        assert cost_tokens(num_tokens, blocks, cost, num_blocks) <= budget_tokens


def test_chunks_are_large_enough_for_good_products_where_one_block_may_take_so_long() -> None:
    assert chunk_tokens(budget_tokens=1000, num_blocks=10) == 1000
    assert chunk_tokens(budget_tokens=80, num_blocks=10) == 512
    assert chunk_tokens(budget_tokens=16, num_blocks=10) == 160
    assert chunk_tokens(budget_tokens=16, num_blocks=1) == 16


def test_a_pass_through_the_whole_span_costs_its_tokens() -> None:
    assert cost_tokens(100, 10, 1, 10) == 100
    assert cost_tokens(100, 5, 2, 10) == 100
    assert cost_tokens(0, 10, 1, 10) == 1
