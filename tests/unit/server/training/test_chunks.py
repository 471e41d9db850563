"""How passes are cut: every token once, in order, within the room where one row allows it."""

from hypothesis import given
from hypothesis import strategies as some

from petals.server.training.chunks import (
    RowChunk,
    blocks_within,
    next_strip,
    tokens_of_strip,
    worth_of,
)


def strips(counts: list[int], max_tokens: int) -> list[RowChunk]:
    found: list[RowChunk] = []
    while (strip := next_strip(counts, found[-1] if found else None, max_tokens)) is not None:
        found.append(strip)
    return found


@given(some.lists(some.integers(0, 50), max_size=30), some.integers(0, 80))
def test_strips_hold_every_token_once(counts: list[int], max_tokens: int) -> None:
    tokens, found = 0, strips(counts, max_tokens)
    for strip, before in zip(found, [None, *found]):
        assert strip.first == tokens and strip.num_tokens > 0
        assert strip.rows.start == (before.rows.stop if before else 0)
        assert strip.num_tokens == sum(counts[row] for row in strip.rows)
        busy = [row for row in strip.rows if counts[row]]
        assert strip.num_tokens <= max_tokens or len(busy) == 1
        tokens = strip.last
    assert tokens == sum(counts)


@given(some.integers(1, 2000), some.integers(1, 100), some.integers(1, 3), some.integers(1, 80))
def test_a_unit_is_worth_no_more_than_its_room(
    room: int, num_tokens: int, worth: int, num_blocks: int
) -> None:
    blocks = blocks_within(room, num_tokens, worth, num_blocks)
    assert blocks >= 1
    if blocks > 1:
        assert worth_of(num_tokens, blocks, worth, num_blocks) <= room


def test_strips_are_large_enough_for_good_products_where_one_block_may_take_so_long() -> None:
    assert tokens_of_strip(room=1000, num_blocks=10) == 1000
    assert tokens_of_strip(room=80, num_blocks=10) == 512
    assert tokens_of_strip(room=16, num_blocks=10) == 160
    assert tokens_of_strip(room=16, num_blocks=1) == 16


def test_what_runs_through_the_whole_span_counts_its_tokens() -> None:
    assert worth_of(100, 10, 1, 10) == 100
    assert worth_of(100, 5, 2, 10) == 100
    assert worth_of(0, 10, 1, 10) == 1
