"""Int8 rows are near f32 and do not notice their neighbours."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals.errors import ConfigError
from petals.models.loading import measure, quantize
from petals.models.loading.quantize import (
    Int8Linear,
    QuantKind,
    choose_precision,
    quantization_config_for,
    quantize_linears,
)
from petals.models.loading.split import LoadOptions, load_blocks
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.models import WriteModel

from .test_split import run_span


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(256, 192)


def test_near_f32(linear: nn.Linear) -> None:
    hidden = torch.randn(5, 7, 256)
    got = Int8Linear(linear.weight, linear.bias)(hidden)
    assert got.shape == (5, 7, 192)
    assert relative_error(got, linear(hidden)) < 0.03


@pytest.mark.parametrize("loud", [30.0, 1e6])
@pytest.mark.parametrize("position", [0, 3])
def test_a_row_does_not_notice_its_neighbours(
    loud: float, position: int, linear: nn.Linear
) -> None:
    narrow = Int8Linear(linear.weight, linear.bias)
    row = torch.randn(1, 256)
    alone = narrow(row)
    company = torch.randn(4, 256) * loud
    company[position] = row
    assert torch.equal(narrow(company)[position : position + 1], alone)


def test_the_plain_kernel_does_notice(linear: nn.Linear) -> None:
    # The reason for Int8Linear: without a pinned range the neighbour sets everybody's scale.
    packed = Int8Linear(linear.weight, None).packed
    row = torch.randn(1, 256)
    loud = torch.cat((row, torch.randn(1, 256) * 30))
    alone = torch.ops.quantized.linear_dynamic(row, packed)
    beside = torch.ops.quantized.linear_dynamic(loud, packed)[:1]
    assert relative_error(beside, alone) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [2, 0])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_any_rows_stay_finite_and_of_their_dtype(
    scale: float, num_rows: int, dtype: torch.dtype, linear: nn.Linear
) -> None:
    output = Int8Linear(linear.weight, linear.bias)((torch.randn(num_rows, 256) * scale).to(dtype))
    assert output.shape == (num_rows, 192) and output.dtype is dtype
    assert output.isfinite().all()


def test_swaps_every_kind_of_linear() -> None:
    class Odd(nn.Linear):
        pass

    root = nn.ModuleList([nn.Linear(4, 3), nn.Sequential(Conv1D(5, 4), Odd(4, 4)), nn.LayerNorm(4)])
    conv = root[1][0]
    hidden = torch.randn(2, 4)
    expected = conv(hidden)
    assert quantize_linears(root) == 2
    assert isinstance(root[0], Int8Linear)
    assert type(root[1][1]) is Odd
    assert relative_error(root[1][0](hidden), expected) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "bloom", "gpt2"])
def test_a_span_in_int8(model_type: str, tiny_folder: WriteModel) -> None:
    folder = str(tiny_folder(model_type))
    exact = load_blocks(folder, BlockSpan(1, 3))
    narrow = load_blocks(folder, BlockSpan(1, 3), LoadOptions(quant=QuantKind.INT8))
    assert narrow.quant is QuantKind.INT8
    assert any(isinstance(module, Int8Linear) for module in narrow.layers.modules())
    hidden = torch.randn(1, 6, 32)
    error = relative_error(run_span(narrow, hidden), run_span(exact, hidden))
    assert 0 < error < 0.1


@torch.no_grad()
@pytest.mark.parametrize("quant", [QuantKind.BNB_INT8, QuantKind.NF4])
def test_a_span_in_bitsandbytes(quant: QuantKind, tmp_path: Path) -> None:
    # bitsandbytes packs 64 weights of a row together.
    folder = str(
        write_tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128, head_dim=32)
    )
    exact = load_blocks(folder, BlockSpan(0, 2))
    narrow = load_blocks(folder, BlockSpan(0, 2), LoadOptions(quant=quant))
    assert any(not p.dtype.is_floating_point for p in narrow.layers.parameters())
    hidden = torch.randn(1, 6, 64)
    error = relative_error(run_span(narrow, hidden), run_span(exact, hidden))
    assert 0 < error < 0.3


def test_four_bits_of_a_width_that_cpu_kernels_misread(tiny_folder: WriteModel) -> None:
    with pytest.raises(ConfigError, match="width of 32 is not a multiple of 64") as caught:
        load_blocks(str(tiny_folder("llama")), BlockSpan(0, 2), LoadOptions(quant=QuantKind.NF4))
    assert "--quant int8" in caught.value.hint


def test_bitsandbytes_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes") as caught:
        quantization_config_for(QuantKind.NF4, torch.float32)
    assert "petals[quant]" in caught.value.hint


class Stopwatch:
    """A clock on which a candidate takes the seconds that its number in the list says.

    It is read before and after each of the repeats with 1 row, and with 8 rows.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.reads = 0
        self.now = 0.0

    def __call__(self) -> float:
        if self.reads % 2:
            self.now += self.seconds[self.reads // (2 * 2 * measure.REPEATS)]
        self.reads += 1
        return self.now


@pytest.mark.parametrize(
    ("seconds", "dtype", "quant"),
    [
        ([3.0, 9.0, 1.0], torch.float32, QuantKind.INT8),
        ([3.0, 1.0, 2.0], torch.bfloat16, QuantKind.NONE),
        ([1.0, 2.0, 2.0], torch.float32, QuantKind.NONE),
    ],
)
def test_the_fastest_is_chosen(seconds: list[float], dtype: torch.dtype, quant: QuantKind) -> None:
    choice = choose_precision(stopwatch=Stopwatch(seconds))
    assert (choice.dtype, choice.quant) == (dtype, quant)
    assert list(choice.seconds) == ["float32", "bfloat16", "int8"]


def test_lossless_choice() -> None:
    assert choose_precision(lossy=False, stopwatch=Stopwatch([3.0, 4.0])).quant is QuantKind.NONE
