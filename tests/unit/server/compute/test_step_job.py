import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import BadInput, BatchTooLarge, LengthExceeded, SessionGap
from petals.server.compute.step_job import StepLimits, StepPlan, TokenRun, plan_step

LIMITS = StepLimits(max_rows=4, max_length=100, max_step_tokens=150)


def test_a_step_goes_on_or_rolls_back() -> None:
    plan = plan_step((5, 2), (1, 3), None, (5, 7), LIMITS)
    assert plan.lengths_after == (6, 5)
    assert plan.num_tokens == 4


def test_a_reorder_comes_first_and_sets_the_rows() -> None:
    plan = plan_step((7, 5, 7), (1, 1, 1), (1, 0, 1), (5, 7), LIMITS)
    assert plan.lengths_after == (8, 6, 8)


@pytest.mark.parametrize(
    ("starts", "counts", "reorder", "error"),
    [
        ((6, 7), (1, 1), None, SessionGap),
        ((7, 7), (1, 1), (1, 0), SessionGap),
        ((5,), (1, 1), None, BadInput),
        ((5, 7), (1,), None, BadInput),
        ((5, 7, 7), (1, 1, 1), None, BadInput),
        ((5, 7), (1, 1), (0, 2), BadInput),
        ((), (), (), BadInput),
        ((5, 7), (1, 94), None, LengthExceeded),
        ((0, 0), (100, 60), None, BatchTooLarge),
        ((5,) * 5, (1,) * 5, (0,) * 5, BatchTooLarge),
    ],
)
def test_numbers_that_cannot_be(
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    reorder: tuple[int, ...] | None,
    error: type[Exception],
) -> None:
    with pytest.raises(error) as caught:
        plan_step(starts, counts, reorder, (5, 7), LIMITS)
    assert type(caught.value) is error


def test_rope_lengths_are_those_of_a_whole_forward_unless_the_step_says_more() -> None:
    plan = plan_step((5, 2), (1, 3), None, (5, 7), LIMITS)
    assert plan.rope_lengths == (6, 5, 5, 5)
    plan = plan_step((5, 2), (1, 3), None, (5, 7), LIMITS, ((2, 9), (1, 5), (1, 100)))
    assert plan.rope_lengths == (9, 9, 5, 100)


@pytest.mark.parametrize(
    ("runs", "error"),
    [
        (((3, 9),), BadInput),
        (((5, 9),), BadInput),
        (((2**31 - 1, 9),), BadInput),
        (((1, 5), (3, 9)), BadInput),
        (((1, 6), (3, 4)), BadInput),
        (((4, 101),), LengthExceeded),
    ],
)
def test_rope_lengths_that_cannot_be(
    runs: tuple[tuple[int, int], ...], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        plan_step((5, 2), (1, 3), None, (5, 7), LIMITS, runs)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("counts", "is_decode"),
    [
        ((1,), True),
        ((0, 0), True),
        ((), True),
        ((16, 3), True),
        ((17, 0), False),
        ((1,) * 128, True),
        ((1,) * 129, False),
    ],
)
def test_short_steps_are_decoding(counts: tuple[int, ...], is_decode: bool) -> None:
    assert StepPlan((0,) * len(counts), counts).is_decode is is_decode


def test_a_piece_ends_with_its_row() -> None:
    plan = StepPlan((10, 0, 4), (3, 0, 5))
    assert list(plan.pieces(1, 4)) == [TokenRun(0, 11, 1, 2), TokenRun(2, 4, 3, 2)]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=6), st.data())
def test_pieces_cover_every_token_once_and_in_order(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    plan = StepPlan(tuple(start for start, _ in rows), tuple(count for _, count in rows))
    done, covered = 0, []
    while done < plan.num_tokens:
        num_tokens = data.draw(st.integers(1, plan.num_tokens - done))
        pieces = list(plan.pieces(done, num_tokens))
        assert sum(piece.count for piece in pieces) == num_tokens
        assert len({piece.row for piece in pieces}) == len(pieces)
        for piece in pieces:
            for i in range(piece.count):
                covered.append((piece.offset + i, piece.row, piece.start + i))
        done += num_tokens
    packed = [(row, start + i) for row, (start, count) in enumerate(rows) for i in range(count)]
    assert covered == [(index, row, position) for index, (row, position) in enumerate(packed)]
