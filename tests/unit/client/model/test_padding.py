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


class TestRefusals:
    def test_whole_attention_masks(self):
        with pytest.raises(NotSupported, match="4 dimensions"):
            read(Rows.empty(1), attention_mask=torch.ones(1, 1, 2, 2))

    def test_soft_masks(self):
        with pytest.raises(NotSupported, match="other than 0 and 1"):
            read(Rows.empty(1), attention_mask=torch.tensor([[0.5, 1.0]]))

    def test_masks_of_another_length(self):
        with pytest.raises(BadInput, match=r"\(1, 3\) instead of \(1, 2\)"):
            read(Rows.empty(1), attention_mask=torch.ones(1, 3))

    def test_masking_what_has_already_run(self):
        past = read(Rows.empty(1))
        with pytest.raises(NotSupported, match="differs"):
            read(past, 1, attention_mask=torch.tensor([[0, 1, 1]]))

    def test_gaps_in_positions(self):
        with pytest.raises(NotSupported, match="do not follow"):
            read(Rows.empty(1), position_ids=torch.tensor([[0, 2]]))
        past = read(Rows.empty(1))
        with pytest.raises(NotSupported, match="do not follow"):
            read(past, 1, position_ids=torch.tensor([[3]]))
        shifted = Rows.empty(1).joined(read(Rows.empty(1), position_ids=torch.tensor([[5, 6]])))
        assert read(shifted, 1, position_ids=torch.tensor([[7]])).first.tolist() == [5]
        with pytest.raises(NotSupported, match="do not follow"):
            read(shifted, 1)

    def test_a_hole_in_a_row_that_is_numbered_by_column(self):
        hole = torch.tensor([[1, 0, 1]])
        with pytest.raises(NotSupported, match="do not follow") as refusal:
            read(Rows.empty(1), 3, attention_mask=hole)
        assert "cumsum" in refusal.value.hint
        assert read(Rows.empty(1), 3, attention_mask=hole, follows_mask=True).lengths == (2,)
        numbered = torch.tensor([[0, 0, 1]])
        assert read(Rows.empty(1), 3, attention_mask=hole, position_ids=numbered).lengths == (2,)

    def test_positions_of_the_wrong_shape(self):
        with pytest.raises(BadInput, match="position_ids"):
            read(Rows.empty(1), position_ids=torch.tensor([[0, 1, 2]]))

    def test_positions_in_space(self):
        flat = torch.arange(2).expand(3, 1, 2)
        assert read(Rows.empty(1), position_ids=flat).lengths == (2,)
        with pytest.raises(NotSupported, match="several dimensions"):
            read(Rows.empty(1), position_ids=flat + torch.arange(3).view(3, 1, 1))
