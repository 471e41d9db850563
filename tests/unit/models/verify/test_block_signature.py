"""Signatures of blocks, and how the self-test uses them."""

from pathlib import Path

import pytest
import torch

from petals.errors import ModelNotSupported
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.split import LoadOptions, load_blocks
from petals.models.runtime.span import Span
from petals.models.verify import self_test
from petals.models.verify.block_signature import signature_of
from petals.models.verify.self_test import gradient_test, run_self_test
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan

NUM_BLOCKS = 5


def tiny_span(model: str, folder: Path) -> Span:
    source = write_tiny_model(folder / model, model, num_hidden_layers=NUM_BLOCKS)
    options = LoadOptions(dtype=torch.float32)
    return Span(load_blocks(open_checkpoint(str(source)), BlockSpan(0, NUM_BLOCKS), options))


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("bloom", [0, 0, 0, 0, 0]),
        ("llama", [0, 0, 0, 0, 0]),
        ("gpt2", [0, 0, 0, 0, 0]),
        ("gemma2", [0, 0, 1, 0, 0]),
        ("qwen3_next", [0, 0, 1, 0, 0]),
        ("deepseek_v3", [0, 0, 1, 1, 1]),
        ("llama4_text", [0, 1, 2, 1, 2]),
    ],
)
def test_blocks_are_told_apart_by_what_they_do(
    model: str, kinds: list[int], tmp_path: Path
) -> None:
    span = tiny_span(model, tmp_path)
    found = [signature_of(span, block) for block in range(len(kinds))]
    assert [found.index(kind) for kind in found] == [kinds.index(kind) for kind in kinds]


def test_blocks_of_a_known_kind_are_tested_briefly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(self_test, "_STRIP_BLOCKS", 1)
    span = tiny_span("gemma2", tmp_path)
    tested, steps = [], []
    trace, replay = span.trace, self_test.replay

    def count_steps(stages: list, given: tuple, *rest: object) -> float:
        steps.append(len(given))
        return replay(stages, given, *rest)

    def count_gradients(segments: list) -> list[torch.Tensor]:
        tested.append(segments[0].blocks.start)
        return trace(segments)

    monkeypatch.setattr(self_test, "replay", count_steps)
    monkeypatch.setattr(span, "trace", count_gradients)
    run_self_test(span)
    assert gradient_test(span) == ""
    full, brief = len(self_test.STEPS), len(self_test.BRIEF_STEPS)
    assert steps == [full, brief, full, brief, brief]
    assert sorted(set(tested)) == [0, 2]


def test_weights_that_are_no_numbers_are_noticed_in_any_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(self_test, "_STRIP_BLOCKS", 1)
    span = tiny_span("llama", tmp_path)
    with torch.no_grad():
        next(span.layers[4].parameters())[0] = torch.nan
    with pytest.raises(ModelNotSupported):
        run_self_test(span)


def test_the_config_counts_by_the_number_of_a_layer_in_its_span(tmp_path: Path) -> None:
    """The config of loaded blocks describes only these; its lists begin with the first of them."""
    folder = write_tiny_model(tmp_path / "gemma2", "gemma2", num_hidden_layers=NUM_BLOCKS)
    span = Span(load_blocks(str(folder), BlockSpan(1, 5)))
    for layer in span.layers:
        layer.attention_type = layer.self_attn.is_sliding = layer.self_attn.sliding_window = None
    first, second, third, fourth = (signature_of(span, block) for block in range(1, 5))
    assert first == third == fourth != second
