import pytest
import torch
from torch import nn

from petals.models.loading import weight_layout
from petals.models.loading.weight_layout import orient_linears


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8))


def test_only_strides_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_layout, "_is_faster_turned", lambda linears: True)
    blocks = layers()
    token = torch.randn(3, 8)
    before, weights = blocks(token), [p.detach().clone() for p in blocks.parameters()]
    assert orient_linears(blocks) == {(24, 8): True, (8, 24): True}
    assert blocks[0].weight.stride() == (1, 24)
    assert all(torch.equal(a, b) for a, b in zip(blocks.parameters(), weights))
    torch.testing.assert_close(blocks(token), before)


def test_parameters_leave_the_memory_they_were_mapped_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_layout, "_is_faster_turned", lambda linears: True)
    blocks = layers()
    mapped = {parameter.data_ptr() for parameter in blocks.parameters()}
    held = [parameter.data for parameter in blocks.parameters()]
    orient_linears(blocks)
    assert not mapped & {parameter.data_ptr() for parameter in blocks.parameters()}
    assert len(held) == 6


def test_other_dtypes_are_left_alone() -> None:
    assert orient_linears(layers().to(torch.bfloat16)) == {}


@pytest.mark.parametrize("column_seconds", [0.5, 1.0, 2.0])
def test_turned_only_if_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, column_seconds: float
) -> None:
    def seconds(weights: list[torch.Tensor], token: torch.Tensor) -> float:
        return 1.0 if weights[0].is_contiguous() else column_seconds

    monkeypatch.setattr(weight_layout, "_seconds", seconds)
    turned = orient_linears(nn.Linear(512, 1024))
    assert set(turned.values()) == {column_seconds < 1.0}


def test_small_matrices_are_not_worth_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_layout, "_seconds", lambda weights, token: 1 / 0)
    assert set(orient_linears(layers()).values()) == {False}
