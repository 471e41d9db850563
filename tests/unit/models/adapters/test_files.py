"""peft's format: what is read, what is refused and why, what is written."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from petals.errors import AdapterRefused, ModelNotFound
from petals.models.adapters.config import LoraConfig
from petals.models.adapters.files import SavedAdapter, read_adapter, write_adapter
from petals.models.adapters.low_rank import check_finite, check_fits
from petals.models.loading.split import load_blocks
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.peft_adapters import peft_model, save_adapter, through_blocks, token_ids
from support.reference import assert_close

ALL = BlockSpan(0, 5)


@pytest.fixture(scope="module")
def span(llama: Path) -> Span:
    return Span(load_blocks(str(llama), ALL))


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    return save_adapter(llama, tmp_path / "adapter")


def rewrite(adapter: Path, *, tensors=None, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if tensors is not None:
        weights = adapter / "adapter_model.safetensors"
        save_file(tensors(load_file(weights)), weights)


def renamed(old: str, new: str):
    return lambda tensors: {key.replace(old, new): value.clone() for key, value in tensors.items()}


def assert_runs(span: Span, adapter, states: torch.Tensor, expected: torch.Tensor) -> None:
    (output,) = span.run([Segment(hidden=states, blocks=ALL, adapter=adapter)])
    assert_close(output, expected)


@torch.no_grad()
def test_patterns_of_ranks_and_scales_and_layers(llama: Path, span: Span, tmp_path: Path) -> None:
    settings = {
        "rank_pattern": {"q_proj": 2, r"layers\.3\.mlp\.down_proj": 6},
        "alpha_pattern": {"v_proj": 30},
        "layers_to_transform": [0, 3],
    }
    model = peft_model(llama, **settings)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path), "layers").adapter
    assert {block for block, _ in adapter.parts} == {0, 3}
    states, expected = through_blocks(model, token_ids(5))
    assert_runs(span, adapter, states, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"r": 5},
        {"r": "eight"},
        {"r": 0},
        {"lora_alpha": "NaN"},
        {"rank_pattern": {"q_proj": 1}},
        {"target_modules": 7},
    ],
)
def test_other_kinds_and_foreign_settings_are_refused(saved: Path, settings) -> None:
    rewrite(saved, **settings)
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(str(saved), "layers")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("adapter_model.bin", b"\x80\x04.", "pickle"),
        ("unrelated", b"", "has no adapter_model"),
        ("adapter_model.safetensors", b"\x00" * 40, "not a whole"),
        ("adapter_config.json", b"[1]", "cannot be read"),
    ],
)
def test_files_that_are_no_adapter(saved: Path, file: str, content: bytes, says: str) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / file).write_bytes(content)
    with pytest.raises(AdapterRefused, match=says):
        read_adapter(str(saved), "layers")


def test_no_adapter_at_all(llama: Path) -> None:
    with pytest.raises(ModelNotFound, match="adapter_config"):
        read_adapter(str(llama), "layers")
    with pytest.raises(ModelNotFound, match="no folder"):
        read_adapter("./poems", "layers")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (renamed("base_model.model.", "model."), "none of peft's"),
        (renamed("model.layers.0.self_attn.q_proj", "lm_head"), "not in a block"),
        (renamed("0.self_attn.q_proj.lora_A.weight", "0.input_layernorm.weight"), "whole modules"),
        (renamed("0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_magnitude"), "plain LoRA"),
        (lambda tensors: dict(list(tensors.items())[1:]), "one is missing"),
        (lambda tensors: {k: v[..., :1].clone() for k, v in tensors.items()}, "rank"),
        (lambda tensors: {k: v[None].clone() for k, v in tensors.items()}, "rank"),
    ],
)
def test_tensors_that_do_not_belong(saved: Path, tensors, says: str) -> None:
    rewrite(saved, tensors=tensors)
    with pytest.raises(AdapterRefused, match=says):
        read_adapter(str(saved), "layers")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (renamed("self_attn.q_proj", "self_attn.w_proj"), "no matrix 'self_attn.w_proj'"),
        (renamed("self_attn.q_proj", "mlp.experts.0.w1"), "no matrix"),
        (renamed("layers.0.", "layers.9."), "Block 9"),
        (renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.rotary"), "no matrix"),
        (renamed("0.self_attn.v_proj", "0.mlp.up_proj"), "another model|maps"),
    ],
)
def test_names_and_shapes_of_another_model(saved: Path, span: Span, tensors, says: str) -> None:
    rewrite(saved, tensors=tensors)
    adapter = read_adapter(str(saved), "layers").adapter
    with pytest.raises(AdapterRefused, match=says):
        check_fits(adapter, span.slots)


def test_experts_take_none(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "mixtral", "mixtral")
    saved = save_adapter(folder, tmp_path / "adapter")
    rewrite(saved, tensors=renamed("self_attn.q_proj", "mlp.experts"))
    span = Span(load_blocks(str(folder), BlockSpan(0, 1)))
    adapter = read_adapter(str(saved), "layers", BlockSpan(0, 1)).adapter
    with pytest.raises(AdapterRefused) as caught:
        check_fits(adapter, span.slots)
    assert "attention" in caught.value.hint


def test_values_that_are_no_numbers(saved: Path, span: Span) -> None:
    rewrite(saved, tensors=lambda tensors: {k: v * float("nan") for k, v in tensors.items()})
    adapter = read_adapter(str(saved), "layers").adapter
    check_fits(adapter, span.slots)
    with pytest.raises(AdapterRefused, match="NaN"):
        check_finite(adapter)


def test_a_digest_is_of_the_content(saved: Path) -> None:
    adapter = read_adapter(str(saved), "layers").adapter
    again = read_adapter(str(saved), "layers").adapter
    assert adapter.digest == again.digest
    part = adapter.within(BlockSpan(1, 3))
    assert part is not None and part.digest != adapter.digest
    assert part.digest == read_adapter(str(saved), "layers", BlockSpan(1, 3)).adapter.digest
    assert adapter.within(BlockSpan(9, 12)) is None
    assert adapter.mapped(lambda tensor: tensor * 2).digest != adapter.digest
    rewrite(saved, lora_alpha=13)
    assert read_adapter(str(saved), "layers").adapter.digest != adapter.digest


@torch.no_grad()
def test_what_is_written_stock_peft_reads(
    llama: Path, span: Span, saved: Path, tmp_path: Path
) -> None:
    read = read_adapter(str(saved), "layers")
    config = LoraConfig.of(peft.LoraConfig.from_pretrained(str(saved)))
    assert config == read.config
    doubled = SavedAdapter(config, read.adapter.mapped(lambda tensor: tensor * 2))
    write_adapter(tmp_path / "mine", doubled, "model.layers")
    again = read_adapter(str(tmp_path / "mine"), "layers")
    assert again.config == config
    assert again.adapter.digest == doubled.adapter.digest
    plain = peft_model(llama).get_base_model()
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "mine")).eval()
    states, expected = through_blocks(model, token_ids(5))
    assert_runs(span, doubled.adapter, states, expected)
