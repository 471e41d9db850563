import json
from pathlib import Path

import pytest
import torch

from petals.errors import ConfigError
from petals.models.loading import quantize
from petals.models.loading.quantize import PrecisionChoice, QuantKind
from petals.server.config import ComputeConfig
from petals.server.lifecycle.throughput import (
    PROBE_FILE,
    Precision,
    Speed,
    choose_precision,
    choose_threads,
    find_device,
    measure,
)
from support.models import whole_model

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The arguments of every probe; it finds int8 fastest, bf16 next."""
    asked: list[bool] = []

    def fastest(device: str, *, lossy: bool) -> PrecisionChoice:
        asked.append(lossy)
        if lossy:
            return PrecisionChoice(dtype=F32, quant=QuantKind.INT8, seconds={})
        return PrecisionChoice(dtype=BF16, quant=QuantKind.NONE, seconds={})

    monkeypatch.setattr(quantize, "choose_precision", fastest)
    return asked


@pytest.mark.parametrize(
    ("config", "stored", "device", "expected"),
    [
        (ComputeConfig(dtype="float32"), BF16, "cpu", Precision(F32, QuantKind.NONE)),
        (ComputeConfig(dtype="bfloat16"), F32, "cpu", Precision(BF16, QuantKind.NONE)),
        (ComputeConfig(dtype="int8"), BF16, "cpu", Precision(F32, QuantKind.INT8)),
        (ComputeConfig(quant="int8"), BF16, "cpu", Precision(F32, QuantKind.INT8)),
        (ComputeConfig(), F32, "cpu", Precision(F32, QuantKind.NONE)),
        (ComputeConfig(), F32, "cuda", Precision(BF16, QuantKind.NONE)),
        (ComputeConfig(dtype="half"), F32, "cpu", Precision(BF16, QuantKind.NONE)),
        (ComputeConfig(dtype="half"), F16, "cuda", Precision(F16, QuantKind.NONE)),
        (ComputeConfig(dtype="half"), BF16, "mps", Precision(F16, QuantKind.NONE)),
        (ComputeConfig(dtype="half", quant="int8"), BF16, "cpu", Precision(F32, QuantKind.INT8)),
        (ComputeConfig(quant="nf4"), BF16, "cuda", Precision(BF16, QuantKind.NF4)),
        (ComputeConfig(), BF16, "mps", Precision(F16, QuantKind.NONE)),
    ],
)
def test_what_is_told_or_clear_is_not_probed(
    config: ComputeConfig,
    stored: torch.dtype,
    device: str,
    expected: Precision,
    probes: list[bool],
    tmp_path: Path,
) -> None:
    assert choose_precision(config, stored, device, tmp_path) == expected
    assert probes == []


def test_half_precision_on_a_cpu_is_probed_once(probes: list[bool], tmp_path: Path) -> None:
    for _ in range(2):
        found = choose_precision(ComputeConfig(), BF16, "cpu", tmp_path)
        assert found == Precision(BF16, QuantKind.NONE)
    assert probes == [False]


def test_auto_quantization_may_take_int8(probes: list[bool], tmp_path: Path) -> None:
    found = choose_precision(ComputeConfig(quant="auto"), F32, "cpu", tmp_path)
    assert found == Precision(F32, QuantKind.INT8)
    assert probes == [True]


def test_f32_weights_are_not_rounded_for_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choice = PrecisionChoice(dtype=BF16, quant=QuantKind.NONE, seconds={})
    monkeypatch.setattr(quantize, "choose_precision", lambda device, *, lossy: choice)
    found = choose_precision(ComputeConfig(quant="auto"), F32, "cpu", tmp_path)
    assert found == Precision(F32, QuantKind.NONE)


@pytest.mark.parametrize(
    "damage", ["", "[1]", "{broken", '{"KEY": 3}', '{"KEY": ["bfloat16", "x"]}']
)
def test_a_damaged_note_is_probed_again(damage: str, probes: list[bool], tmp_path: Path) -> None:
    note = tmp_path / PROBE_FILE
    choose_precision(ComputeConfig(), BF16, "cpu", tmp_path)
    (key,) = json.loads(note.read_text())
    note.write_text(damage.replace("KEY", key))
    for _ in range(2):
        assert choose_precision(ComputeConfig(), BF16, "cpu", tmp_path).dtype is BF16
    assert probes == [False, False]


def test_a_cache_that_cannot_be_written_costs_only_the_note(
    probes: list[bool], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    found = choose_precision(ComputeConfig(), BF16, "cpu", tmp_path / "file" / "below")
    assert found.dtype is BF16


def test_a_device_must_exist() -> None:
    assert find_device("cpu") == "cpu"
    assert find_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="no mps device"):
        find_device("mps")


def test_threads_leave_busy_cores_alone() -> None:
    assert choose_threads(7, load=lambda: 100.0) == 7
    assert choose_threads(None, load=lambda: 100.0) == 1
    assert 1 <= choose_threads(None, load=lambda: 0.0) <= torch.get_num_threads()


def test_a_span_is_timed() -> None:
    speed = measure(whole_model("llama"))
    assert 0 < speed.prefill_seconds_per_token < speed.decode_seconds
    assert speed.blocks_per_second(4) == pytest.approx(4 / speed.decode_seconds)
    assert speed.bulk_blocks_per_second(4) > speed.blocks_per_second(4)


def test_two_measurements_foretell_a_batch() -> None:
    cost = Speed(decode_seconds=0.02, prefill_seconds_per_token=0.051 / 32).batch_cost()
    assert cost.seconds(1) == pytest.approx(0.02)
    assert cost.seconds(32) == pytest.approx(0.051)
    # A prompt that takes no longer than a token (a GPU) must not divide by zero.
    assert Speed(0.02, 0.0001).batch_cost().tokens_within(0.1) > 1000
