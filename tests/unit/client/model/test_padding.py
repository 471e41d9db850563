"""Padded batches to ragged rows and back, and masks that are not padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals.client.model.padding import (
    UNKNOWN,
    ColumnLayout,
    Rows,
    pack,
    read_columns,
    to_left_padding,
    unpack,
)
from petals.errors import BadInput, NotSupported

MASKS = st.integers(1, 4).flatmap(
    lambda columns: st.lists(
        st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=4
    )
)


@given(MASKS)
def test_packing_keeps_tokens_and_drops_padding(mask):
    real = torch.tensor(mask)
    hidden = torch.randn(*real.shape, 3)
    packed = pack(hidden, real)
    assert packed.shape == (int(real.sum()), 3)
    there_and_back = unpack(packed, real)
    assert torch.equal(there_and_back[real], hidden[real])
    assert not there_and_back[~real].any()


@given(MASKS, st.integers(0, 4))
def test_reading_in_two_parts_is_reading_at_once(mask, cut):
    mask = torch.tensor(mask).long()
    num_rows, num_columns = mask.shape
    cut = min(cut, num_columns)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = read_columns(
        Rows.empty(num_rows),
        ColumnLayout(
            num_rows=num_rows, num_columns=num_columns, attention_mask=mask, position_ids=positions
        ),
    )
    past = Rows.empty(num_rows)
    for begin, end in ((0, cut), (cut, num_columns)):
        layout = ColumnLayout(
            num_rows=num_rows,
            num_columns=end - begin,
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
        )
        past = past.joined(read_columns(past, layout))
    assert torch.equal(past.real, whole.real)
    assert torch.equal(past.first, whole.first)
    assert past.lengths == tuple(mask.sum(1).tolist())


@given(MASKS)
def test_moving_padding_to_the_left_keeps_the_order_of_tokens(mask):
    mask = torch.tensor(mask).long()
    order = to_left_padding(mask)
    ids = torch.arange(mask.numel()).view(mask.shape)
    if order is None:
        assert torch.equal(mask, mask.sort(dim=1).values)
        return
    moved, moved_mask = ids.gather(1, order), mask.gather(1, order)
    assert torch.equal(moved_mask, mask.sort(dim=1).values)
    assert torch.equal(moved[moved_mask.bool()], ids[mask.bool()])


def read(past, num_columns=2, **told):
    return read_columns(past, ColumnLayout(num_rows=past.num_rows, num_columns=num_columns, **told))


def test_without_a_mask_all_are_tokens():
    rows = read(Rows.empty(2))
    assert rows.lengths == (2, 2)
    assert rows.first.tolist() == [0, 0]


def test_first_positions_are_kept_row_by_row():
    rows = read(Rows.empty(3), attention_mask=torch.tensor([[1, 1], [0, 1], [0, 0]]))
    assert rows.first.tolist() == [0, 1, UNKNOWN]
    assert rows.select([2, 1, 1]).first.tolist() == [UNKNOWN, 1, 1]


PAST = read(Rows.empty(1))
HOLE, FLAT = torch.tensor([[1, 0, 1]]), torch.arange(2).expand(3, 1, 2)
SHIFTED = Rows.empty(1).joined(read(Rows.empty(1), position_ids=torch.tensor([[5, 6]])))


@pytest.mark.parametrize(
    ("past", "num_columns", "told", "kind", "words"),
    [
        (None, 2, {"attention_mask": torch.ones(1, 1, 2, 2)}, NotSupported, "4 dimensions"),
        (None, 2, {"attention_mask": torch.tensor([[0.5, 1.0]])}, NotSupported, "than 0 and 1"),
        (None, 2, {"attention_mask": torch.ones(1, 3)}, BadInput, r"\(1, 3\) instead of \(1, 2\)"),
        (PAST, 1, {"attention_mask": torch.tensor([[0, 1, 1]])}, NotSupported, "differs"),
        (None, 2, {"position_ids": torch.tensor([[0, 2]])}, NotSupported, "do not follow"),
        (PAST, 1, {"position_ids": torch.tensor([[3]])}, NotSupported, "do not follow"),
        (SHIFTED, 1, {}, NotSupported, "do not follow"),
        (None, 3, {"attention_mask": HOLE}, NotSupported, r"do not follow[\s\S]*cumsum"),
        (None, 2, {"position_ids": torch.tensor([[0, 1, 2]])}, BadInput, "position_ids"),
        (
            None,
            2,
            {"position_ids": FLAT + torch.arange(3).view(3, 1, 1)},
            NotSupported,
            "several dimensions",
        ),
    ],
)
def test_refusals(past, num_columns, told, kind, words):
    with pytest.raises(kind, match=words):
        read(past or Rows.empty(1), num_columns, **told)


@pytest.mark.parametrize(
    ("past", "num_columns", "told", "length", "first"),
    [
        (SHIFTED, 1, {"position_ids": torch.tensor([[7]])}, 1, 5),
        (None, 3, {"attention_mask": HOLE, "follows_mask": True}, 2, 0),
        (None, 3, {"attention_mask": HOLE, "position_ids": torch.tensor([[0, 0, 1]])}, 2, 0),
        (None, 2, {"position_ids": FLAT}, 2, 0),
    ],
    ids=["shifted", "numbered by the mask", "numbered by the caller", "equal in all dimensions"],
)
def test_positions_without_gaps(past, num_columns, told, length, first):
    rows = read(past or Rows.empty(1), num_columns, **told)
    assert (rows.lengths, rows.first.tolist()) == ((length,), [first])
