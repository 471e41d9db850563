import math

import pytest
import torch

from petals.errors import ModelNotSupported
from petals.models.loading.quantize import QuantKind, quantize_linears
from petals.models.runtime.span import Mode, Span
from petals.models.verify.self_test import gradient_test, relative_error, run_self_test
from support.models import whole_model


def test_a_right_span_keeps_its_mode() -> None:
    outcome = run_self_test(whole_model("bloom"))
    assert outcome.mode is Mode.PACKED and outcome.reason == "" and outcome.error < 1e-5


def test_factors_of_long_texts_are_tried_before_the_first_long_text() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 200,
    }
    span = whole_model("llama", rope_parameters=rope)
    assert span.rope_limit == 200
    assert run_self_test(span).error < 1e-5
    with pytest.raises(ModelNotSupported):
        whole_model("llama", rope_parameters=rope | {"long_factor": [2.0] * 3})


def test_a_span_that_is_wrong_in_every_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Span.reference
    monkeypatch.setattr(Span, "reference", lambda self, *states: reference(self, *states) * 1.01)
    span = whole_model("llama")
    with pytest.raises(ModelNotSupported, match="differ") as refused:
        run_self_test(span)
    assert refused.value.hint
    assert span.mode is Mode.ONE_BY_ONE


def test_a_recurrence_that_takes_one_token_at_a_time_gets_them_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    span = whole_model("qwen3_next")
    run = span.run

    def spoil_later_parts(segments: list) -> list[torch.Tensor]:
        outputs = run(segments)
        several = segments[0].start > 0 and segments[0].hidden.shape[0] > 1
        is_wrong = several and span.mode is not Mode.TOKEN_BY_TOKEN
        return [output + 1 for output in outputs] if is_wrong else outputs

    monkeypatch.setattr(span, "run", spoil_later_parts)
    outcome = run_self_test(span)
    assert outcome.mode is Mode.TOKEN_BY_TOKEN
    assert outcome.error < 1e-4


@pytest.mark.parametrize("model", ["llama", "bloom", "mixtral", "deepseek_v3", "qwen3_next"])
def test_gradients_are_the_models_own(model: str) -> None:
    assert gradient_test(whole_model(model)) == ""


def test_wrong_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    span = whole_model("llama")
    trace = span.trace

    def spoilt(segments: list) -> list[torch.Tensor]:
        *inner, last = trace(segments)
        return [*inner, last + 0.01 * inner[-1]]

    monkeypatch.setattr(span, "trace", spoilt)
    assert "differ" in gradient_test(span)


def test_blocks_that_cannot_go_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    span = whole_model("llama")
    monkeypatch.setattr(span, "trace", lambda segments: [segments[0].hidden.detach()[None]])
    assert "backward" in gradient_test(span)


def test_int8_gives_no_gradients() -> None:
    span = whole_model("llama")
    quantize_linears(span.layers)
    span.quant = QuantKind.INT8
    assert "int8" in gradient_test(span)


def test_a_checkpoints_own_narrow_weights_give_none() -> None:
    span = whole_model("llama")
    projection = span.layers[0].mlp.up_proj
    projection.weight.data = projection.weight.data.to(torch.float8_e4m3fn)
    assert "quantization" in gradient_test(span)


def test_one_token_that_differs_counts_only_in_exact_arithmetic() -> None:
    expected = torch.ones(9, 4)
    found = expected.clone()
    found[3] *= 2
    assert relative_error(found, expected, exact=True) == 1.0
    assert relative_error(found, expected, exact=False) == 0.0


def test_what_is_not_finite_is_never_close() -> None:
    assert math.isnan(relative_error(torch.tensor([[torch.nan]]), torch.ones(1, 1), exact=False))
