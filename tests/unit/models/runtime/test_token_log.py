"""Token logs against plain lists, and the budget that they share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.errors import OutboxLost
from petals.models.runtime.token_log import LogBudget, RowSlices, TokenLog, split_counts

WIDTH = 2
TOKEN_BYTES = WIDTH * 4


def tokens(numbers: list[int]) -> torch.Tensor:
    """[len(numbers), WIDTH], every token known by its number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()


def lengths(numbers: list[int]) -> tuple[int, ...]:
    """Rope lengths that show to which token they belong."""
    return tuple(number + 7 for number in numbers)


def append(log: TokenLog, counts: tuple[int, ...], numbers: list[int]) -> None:
    log.append(counts, tokens(numbers), lengths(numbers))


def contents(log: TokenLog) -> list[list[int]]:
    whole = log.whole()
    if whole is None:
        return [[] for _ in log.lengths]
    assert whole.counts == log.lengths
    assert whole.rope_lengths == lengths([int(token[0]) for token in whole.hidden])
    return [[int(token[0]) for token in row] for row in whole.hidden.split(list(whole.counts))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_log_is_a_list_of_lists(data: st.DataObject) -> None:
    budget = LogBudget(10**9)
    log, model = budget.open(2), [[], []]
    branches = []
    for number in range(data.draw(st.integers(1, 12))):
        reorder = None
        if data.draw(st.booleans()):
            row = st.integers(0, len(model) - 1)
            reorder = data.draw(st.lists(row, min_size=1, max_size=4))
            model = [list(model[row]) for row in reorder]
        starts = [data.draw(st.integers(max(0, len(row) - 9), len(row))) for row in model]
        counts = [data.draw(st.sampled_from([0, 1, 3, 140])) for _ in model]
        numbers = [[1000 * number + i for i in range(count)] for count in counts]
        new = [n for row in numbers for n in row]
        if data.draw(st.booleans()):
            before = contents(log)
            branch = log.branch(starts, reorder)
            append(branch, counts, new)
            assert contents(log) == before
            log.take(branch)
        else:
            log.cut(starts, reorder)
            append(log, counts, new)
        model = [row[:start] + new for row, start, new in zip(model, starts, numbers)]
        assert contents(log) == model
        assert budget.used_bytes == log.num_bytes == sum(map(len, model)) * TOKEN_BYTES
        branches.append((log.branch(), [list(row) for row in model]))
    for branch, expected in branches:
        starts = [data.draw(st.integers(0, len(row))) for row in expected]
        counts = [data.draw(st.integers(0, 200)) for _ in expected]
        read = [int(n[0]) for part in branch.read(starts, counts) for n in part.hidden]
        cut = [row[at : at + count] for row, at, count in zip(expected, starts, counts)]
        assert read == [number for row in cut for number in row]
    log.drop()
    assert budget.used_bytes == 0


def test_what_came_since() -> None:
    log = TokenLog(2)
    append(log, (3, 2), [1, 2, 3, 11, 12])
    append(log, (1, 0), [4])
    since = log.since((2, 2))
    assert since is not None
    assert (since.starts, since.counts) == ((2, 2), (2, 0))
    assert since.hidden[:, 0].tolist() == [3, 4]
    assert log.since(log.lengths) is None
    assert TokenLog(3).whole() is None


def test_the_oldest_log_makes_room_as_a_whole() -> None:
    budget = LogBudget(10 * TOKEN_BYTES)
    old, young = budget.open(2), budget.open(1)
    append(old, (2, 2), [1, 2, 3, 4])
    append(young, (6,), [5] * 6)
    assert contents(old) == [[1, 2], [3, 4]]
    append(young, (1,), [6])
    assert old.is_dropped and old.lengths == (2, 2)
    assert budget.used_bytes == 7 * TOKEN_BYTES
    with pytest.raises(OutboxLost) as caught:
        old.whole()
    assert caught.value.hint
    assert contents(young) == [[5] * 6 + [6]]


def test_what_was_dropped_stays_so_until_every_row_begins_anew() -> None:
    budget = LogBudget(4 * TOKEN_BYTES)
    log = budget.open(1)
    append(log, (5,), [1] * 5)
    assert log.is_dropped and budget.free_bytes == 4 * TOKEN_BYTES
    log.cut((4,))
    append(log, (1,), [2])
    assert log.is_dropped and log.lengths == (5,)
    assert log.branch((4,)).is_dropped
    log.take(log.branch((0,)))
    append(log, (2,), [3, 4])
    assert contents(log) == [[3, 4]]


def test_rows_that_grow_token_by_token_stay_in_few_chunks() -> None:
    log = TokenLog(1)
    for number in range(1000):
        append(log, (1,), [number])
    assert contents(log) == [list(range(1000))]
    assert len(list(log.read((0,), (1000,)))) < 30


def test_parts_keep_no_other_rows_memory_alive() -> None:
    log = TokenLog(2)
    append(log, (300, 200), [7] * 500)
    log.cut((10, 200))
    held = list(log.read((0, 0), log.lengths))
    assert [part.hidden.untyped_storage().nbytes() for part in held] == [80, 1600]


def test_parts_follow_each_other() -> None:
    whole = RowSlices((2, 5, 0), (3, 0, 2), tokens([1, 2, 3, 4, 5]), lengths([1, 2, 3, 4, 5]))
    parts = [(part.starts, part.counts, part.hidden[:, 0].tolist()) for part in whole.parts(2)]
    assert parts == [
        ((2, 5, 0), (2, 0, 0), [1, 2]),
        ((4, 5, 0), (1, 0, 1), [3, 4]),
        ((5, 5, 1), (0, 0, 1), [5]),
    ]
    (part,) = whole.parts(0)
    assert part.counts == whole.counts and len(part.hidden) == 5
    assert list(split_counts((4, 1), (0, 0), 3)) == [((4, 1), (0, 0))]
