"""Outboxes against plain lists, and the budget they share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.errors import OutboxLost
from petals.server.compute.step_plan import TokenRun
from petals.server.session.output_log import OutputLog, OutputLogBudget

WIDTH = 2
TOKEN_BYTES = WIDTH * 4


def tokens(numbers: list[int]) -> torch.Tensor:
    """[len(numbers), WIDTH], every token known by its number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()


def contents(outbox: OutputLog) -> list[list[int]]:
    rows = outbox.rows()
    assert rows.lengths == outbox.lengths
    return [
        [int(token[0]) for part in rows.read([TokenRun(row, 0, 0, length)]) for token in part]
        for row, length in enumerate(rows.lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_outbox_is_a_list_of_lists(data: st.DataObject) -> None:
    outboxes = OutputLogBudget(10**9)
    outbox, model = outboxes.open(2), [[], []]
    snapshots = []
    for number in range(data.draw(st.integers(1, 12))):
        reorder = None
        if data.draw(st.booleans()):
            row = st.integers(0, len(model) - 1)
            reorder = data.draw(st.lists(row, min_size=1, max_size=4))
            model = [list(model[row]) for row in reorder]
        starts = [data.draw(st.integers(max(0, len(row) - 9), len(row))) for row in model]
        counts = [data.draw(st.sampled_from([0, 1, 3, 140])) for _ in model]
        outbox.cut(starts, reorder)
        numbers = [[1000 * number + i for i in range(count)] for count in counts]
        outbox.append(counts, tokens([n for row in numbers for n in row]))
        model = [row[:start] + new for row, start, new in zip(model, starts, numbers)]
        assert contents(outbox) == model
        assert outboxes.used_bytes == sum(map(len, model)) * TOKEN_BYTES
        snapshots.append((outbox.rows(), [list(row) for row in model]))
    for rows, expected in snapshots:
        for row, numbers in enumerate(expected):
            start = data.draw(st.integers(0, len(numbers)))
            count = data.draw(st.integers(0, 200))
            parts = rows.read([TokenRun(row, start, 0, count)])
            read = [int(token[0]) for part in parts for token in part]
            assert read == numbers[start : start + count]
    outbox.drop()
    assert outboxes.used_bytes == 0


def test_the_oldest_session_makes_room_as_a_whole() -> None:
    outboxes = OutputLogBudget(10 * TOKEN_BYTES)
    old, young = outboxes.open(2), outboxes.open(1)
    old.append((2, 2), tokens([1, 2, 3, 4]))
    young.append((6,), tokens([5] * 6))
    assert contents(old) == [[1, 2], [3, 4]]
    young.append((1,), tokens([6]))
    assert old.is_lost and outboxes.used_bytes == 7 * TOKEN_BYTES
    with pytest.raises(OutboxLost) as caught:
        old.rows()
    assert caught.value.hint
    assert contents(young) == [[5] * 6 + [6]]


def test_what_is_lost_stays_lost_until_it_begins_anew() -> None:
    outboxes = OutputLogBudget(4 * TOKEN_BYTES)
    outbox = outboxes.open(1)
    outbox.append((5,), tokens([1] * 5))
    assert outbox.is_lost and outboxes.free_bytes == 4 * TOKEN_BYTES
    outbox.cut((5,))
    outbox.append((1,), tokens([2]))
    assert outbox.is_lost
    outbox.cut((0,))
    outbox.append((2,), tokens([3, 4]))
    assert contents(outbox) == [[3, 4]]


def test_rows_that_grow_token_by_token_stay_in_few_chunks() -> None:
    outbox = OutputLogBudget(10**9).open(1)
    for number in range(1000):
        outbox.append((1,), tokens([number]))
    assert contents(outbox) == [list(range(1000))]
    assert len(list(outbox.rows().read([TokenRun(0, 0, 0, 1000)]))) < 30


def test_parts_keep_no_neighbours_memory_alive() -> None:
    outbox = OutputLogBudget(10**9).open(2)
    outbox.append((300, 200), tokens([7] * 500))
    outbox.cut((10, 200))
    rows = outbox.rows()
    held = list(rows.read([TokenRun(0, 0, 0, 10), TokenRun(1, 0, 0, 200)]))
    assert [part.untyped_storage().nbytes() for part in held] == [80, 1600]
