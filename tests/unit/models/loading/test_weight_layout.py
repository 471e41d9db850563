import pytest
import torch
from torch import nn

from petals.models.loading import weight_layout
from petals.models.loading.weight_layout import choose_weight_layouts


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8))


@pytest.fixture
def by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any size are measured, and found faster by column."""
    monkeypatch.setattr(weight_layout, "MIN_MATRIX_BYTES", 0)
    monkeypatch.setattr(weight_layout, "is_clearly_faster", lambda *ways: True)


@pytest.mark.usefixtures("by_column")
def test_only_strides_change_and_parameters_leave_the_memory_they_were_mapped_from() -> None:
    blocks = layers()
    token = torch.randn(3, 8)
    before, weights = blocks(token), [p.detach().clone() for p in blocks.parameters()]
    held = [parameter.data for parameter in blocks.parameters()]
    assert choose_weight_layouts(blocks) == {(24, 8): True, (8, 24): True}
    assert blocks[0].weight.stride() == (1, 24)
    assert all(torch.equal(a, b) for a, b in zip(blocks.parameters(), weights))
    torch.testing.assert_close(blocks(token), before)
    assert not {p.data_ptr() for p in blocks.parameters()} & {data.data_ptr() for data in held}


def test_other_dtypes_are_left_alone() -> None:
    assert choose_weight_layouts(layers().to(torch.bfloat16)) == {}


@pytest.mark.parametrize("is_faster", [True, False])
def test_large_matrices_are_measured(monkeypatch: pytest.MonkeyPatch, is_faster: bool) -> None:
    monkeypatch.setattr(weight_layout, "is_clearly_faster", lambda *ways: is_faster)
    linear = nn.Linear(512, 1024)
    assert set(choose_weight_layouts(linear).values()) == {is_faster}
    assert linear.weight.is_contiguous() is not is_faster


def test_small_matrices_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_layout, "is_clearly_faster", lambda *ways: 1 / 0)
    assert set(choose_weight_layouts(layers()).values()) == {False}
