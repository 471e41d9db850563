"""A client's ends around the whole model's own layers answer as the whole model does."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from petals.errors import ModelFilesBroken, ModelNotSupported
from petals.models.checkpoint.arch import ModelArch
from petals.models.loading import head
from petals.models.loading.head import (
    ChunkedHead,
    ClientPartOptions,
    HeadKind,
    base_within,
    load_client_part,
)
from petals.models.loading.split import LoadOptions
from petals.testing.tiny_models import PUBLISHED
from support.models import WriteModel

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(2))


def no_layers(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
    return nn.ModuleList()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "published"),
    [
        ("llama", False),
        ("bloom", False),
        ("bloom", True),
        ("mixtral", True),
        ("deepseek_v3", True),
        ("gemma3", False),
        ("mistral3", False),
        ("gpt2", False),
        ("opt", False),
        ("falcon", False),
    ],
)
def test_logits_are_the_whole_models(
    model_type: str, published: bool, tiny_folder: WriteModel
) -> None:
    folder = tiny_folder(model_type, PUBLISHED[model_type] if published else None)
    wraps_text = model_type in ("gemma3", "mistral3")
    auto = AutoModelForImageTextToText if wraps_text else AutoModelForCausalLM
    whole = auto.from_pretrained(folder, dtype=torch.float32)

    def layers_of_whole(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
        return base_within(whole, arch).get_submodule(arch.layers_path)

    ends = load_client_part(str(folder), HeadKind.CAUSAL_LM, layers_of_whole)
    assert type(ends).__name__ == type(whole).__name__
    assert torch.equal(ends(IDS, use_cache=False).logits, whole(IDS, use_cache=False).logits)


def test_only_the_ends_are_loaded(tiny_folder: WriteModel) -> None:
    ends = load_client_part(str(tiny_folder("gemma3")), HeadKind.CAUSAL_LM, no_layers)
    names = {name for name, _ in ends.named_parameters()}
    assert names == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    assert not any(p.requires_grad for p in ends.parameters())


def test_config_and_generation_config_are_the_models(edited: WriteModel) -> None:
    folder = edited("llama")
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    ends = load_client_part(str(folder), HeadKind.CAUSAL_LM, no_layers)
    assert ends.config.num_hidden_layers == 5
    assert ends.config.name_or_path == str(folder)
    assert ends.generation_config.temperature == 0.3


def test_base_model(tiny_folder: WriteModel) -> None:
    ends = load_client_part(str(tiny_folder("bloom")), HeadKind.BASE, no_layers)
    assert type(ends).__name__ == "BloomModel"
    assert isinstance(ends.h, nn.ModuleList)


def test_new_score_head_is_trainable(tiny_folder: WriteModel) -> None:
    ends = load_client_part(str(tiny_folder("llama")), HeadKind.SEQUENCE_CLASSIFICATION, no_layers)
    assert [n for n, p in ends.named_parameters() if p.requires_grad] == ["score.weight"]
    assert ends.score.weight.isfinite().all()
    assert ends.score.weight.abs().sum() > 0


def test_saved_score_head_is_loaded(tiny_folder: WriteModel, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(tiny_folder("llama"), num_labels=3)
    whole.save_pretrained(tmp_path)
    ends = load_client_part(str(tmp_path), HeadKind.SEQUENCE_CLASSIFICATION, no_layers)
    assert torch.equal(ends.score.weight, whole.score.weight)


@pytest.mark.parametrize("kind", [HeadKind.CAUSAL_LM, HeadKind.SEQUENCE_CLASSIFICATION])
def test_missing_norm_is_fatal(kind: HeadKind, edited: WriteModel) -> None:
    folder = edited("llama", {"model.norm.weight": None})
    with pytest.raises(ModelFilesBroken, match=r"model\.norm\.weight"):
        load_client_part(str(folder), kind, no_layers)


def test_class_that_transformers_lacks(tiny_folder: WriteModel) -> None:
    with pytest.raises(ModelNotSupported, match="sequence-classification"):
        load_client_part(str(tiny_folder("codegen")), HeadKind.SEQUENCE_CLASSIFICATION, no_layers)


CHUNKED = ClientPartOptions(load=LoadOptions(dtype=torch.bfloat16), chunked=True, chunk_rows=17)
MEASURED = ClientPartOptions(load=LoadOptions(dtype=torch.bfloat16))
WIDE = ClientPartOptions(chunked=True)


@pytest.mark.parametrize(
    ("options", "is_faster", "is_chunked"),
    [(MEASURED, True, True), (MEASURED, False, False), (WIDE, True, False), (CHUNKED, False, True)],
)
def test_narrow_heads_are_chunked_if_asked_or_faster(
    options: ClientPartOptions,
    is_faster: bool,
    is_chunked: bool,
    tiny_folder: WriteModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "prefers_chunks", lambda weight: is_faster)
    ends = load_client_part(str(tiny_folder("llama")), HeadKind.CAUSAL_LM, no_layers, options)
    assert type(ends.lm_head) is (ChunkedHead if is_chunked else nn.Linear)


def test_chunked_head_equals_wide_arithmetic(tiny_folder: WriteModel) -> None:
    ends = load_client_part(str(tiny_folder("bloom")), HeadKind.CAUSAL_LM, no_layers, CHUNKED)
    assert ends.lm_head.weight is ends.transformer.word_embeddings.weight
    hidden = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    expected = hidden.float() @ ends.lm_head.weight.float().T
    torch.testing.assert_close(ends.lm_head(hidden), expected)


def test_chunked_head_has_gradients() -> None:
    linear = nn.Linear(8, 20, dtype=torch.bfloat16)
    hidden = torch.randn(3, 8, requires_grad=True)
    ChunkedHead(linear, 6)(hidden).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0], linear.weight.float().sum(0))


def test_measurement_answers() -> None:
    assert head.prefers_chunks(torch.randn(64, 32).bfloat16()) in (True, False)
