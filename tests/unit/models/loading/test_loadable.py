"""A checkpoint loads equal to transformers, or is refused by its config and tensor names alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from petals import AutoDistributedModelForCausalLM
from petals.cli.main import app
from petals.cli.terminal.console import run_as_command
from petals.errors import ConfigError, ModelFilesBroken, ModelNotSupported
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.cost import block_costs
from petals.models.loading.head import ClientPartOptions, HeadKind, load_client_part
from petals.models.loading.loadable import check_quant, check_weights, config_in_memory
from petals.models.loading.quantize import QuantKind, fix_4bit_layers
from petals.models.loading.split import LoadOptions, load_blocks
from petals.server.config import ServerConfig, SourceConfig
from petals.server.server import Server
from petals.types import BlockSpan
from support import quantized as formats
from support.models import WriteModel

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(2))

SETTINGS: dict[str, dict[str, Any]] = {
    "awq": formats.AWQ,
    "gptq": formats.GPTQ,
    "compressed-tensors": formats.COMPRESSED,
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "bitsandbytes_4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes_8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "auto-round": {"bits": 4},
}
"""Settings of quantization methods that need some, beside their name."""


@torch.no_grad()
def assert_equal_to_transformers(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Blocks loaded in two spans, between a client's ends, compute what the whole model does."""
    checkpoint, load = open_checkpoint(str(folder)), LoadOptions(dtype=dtype)
    spans = [load_blocks(checkpoint, span, load) for span in (BlockSpan(0, 2), BlockSpan(2, 5))]
    layers = nn.ModuleList(layer for loaded in spans for layer in loaded.layers)
    options = ClientPartOptions(load=load, chunked=False)
    ends = load_client_part(checkpoint, HeadKind.CAUSAL_LM, lambda *arch: layers, options)
    given = {} if dtype is None else {"dtype": dtype}
    whole = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **given)
    if dtype is not None:
        # transformers leaves norms and embeddings in the stored dtype.
        whole.to(dtype)
    fix_4bit_layers(whole)
    expected = whole(IDS, use_cache=False).logits
    assert torch.equal(ends(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    ("model_type", "settings", "change"),
    [
        ("llama", formats.FP8, formats.fp8_blocks),
        ("mixtral", formats.FP8, formats.fp8_blocks),
        ("deepseek_v3", formats.FP8, formats.fp8_blocks),
        ("llama", formats.FP8_STATIC, formats.fp8_static),
        ("llama", formats.MXFP8, formats.mxfp8),
        ("gpt_oss", formats.MXFP4, formats.mxfp4_experts),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_quantized_as_transformers_has_it(
    tmp_path: Path,
    model_type: str,
    settings: dict[str, Any],
    change: Callable[..., Any],
    stored: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    folder = formats.write_quantized(
        tmp_path, settings, change, model_type, stored=stored, intermediate_size=64
    )
    check_weights(open_checkpoint(str(folder)))
    assert_equal_to_transformers(folder, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ],
    ids=["int8", "nf4", "double"],
)
def test_quantized_by_bitsandbytes(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = formats.write_bitsandbytes(tmp_path, **settings)
    check_weights(open_checkpoint(str(folder)))
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("method", AUTO_QUANTIZER_MAPPING)
def test_every_method_of_transformers_is_equal_or_refused(tmp_path: Path, method: str) -> None:
    settings = {"quant_method": method} | SETTINGS.get(method, {})
    folder = formats.write_quantized(tmp_path, settings)
    try:
        check_weights(open_checkpoint(str(folder)))
        assert_equal_to_transformers(folder)
    except (ModelNotSupported, ModelFilesBroken) as refusal:
        sentence, _, hint = str(refusal).partition("\nhint: ")
        assert str(folder) in sentence and hint
        assert "\n" not in sentence and len(sentence.removeprefix(str(folder))) < 400


REFUSED: list[tuple[Any, Callable[..., Any], str]] = [
    (formats.MODELOPT, formats.fp8_tensors, "'modelopt', which transformers 5"),
    (None, formats.fp8_tensors, r"holds model.layers.0.mlp.down_proj.input_scale and 69 more"),
    (formats.FP8, formats.fp8_tensors, "holds model.layers.0.mlp.down_proj.input_scale and 69"),
    (formats.MODELOPT | {"quant_algo": "NVFP4"}, formats.nvfp4, "'modelopt', which"),
    (None, formats.nvfp4, "holds model.layers.0.mlp.down_proj.input_scale and 104 more"),
    ({"quant_method": "nvfp4"}, formats.nvfp4, "NVFP4 checkpoints is not supported"),
    (formats.AWQ, formats.packed_words, "with awq .*requires gptqmodel"),
    (formats.GPTQ, formats.packed_words, "with gptq .*requires optimum"),
    (formats.COMPRESSED, formats.compressed, "compressed-tensors>=.* is required"),
    ({"quant_method": "exl2", "bits": 4.0}, formats.packed_words, "'exl2', which transformers 5"),
    ({"quant_method": "torchao"}, dict, "layout of its tensors in the headers"),
    ({"quant_method": "hqq"}, dict, "with hqq .*HQQ version"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, dict, "they have no scales"),
    ({"bits": 4}, dict, "names no quant_method"),
    ({}, dict, "names no quant_method"),
    ("int4", dict, "quantization_config, is not a JSON object"),
]


@pytest.mark.parametrize(("settings", "change", "reason"), REFUSED)
def test_what_transformers_would_read_wrongly(
    tmp_path: Path, settings: Any, change: Callable[..., Any], reason: str
) -> None:
    folder = formats.write_quantized(tmp_path, settings, change)
    with pytest.raises(ConfigError, match=reason):
        check_weights(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("settings", "change"), [(formats.MODELOPT, formats.fp8_tensors), (None, formats.fp8_tensors)]
)
def test_serve_plan_and_client_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Any, change: Callable[..., Any]
) -> None:
    folder = str(formats.write_quantized(tmp_path, settings, change))
    with pytest.raises(ConfigError) as expected:
        check_weights(open_checkpoint(folder))
    with pytest.raises(ConfigError) as client:
        AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[])
    with pytest.raises(ConfigError) as server:
        Server(ServerConfig(source=SourceConfig(model=folder)))._plan_model()
    with pytest.raises(SystemExit) as plan:
        run_as_command(lambda: app(["models", "plan", folder]))
    printed = " ".join(capsys.readouterr().err.split())
    assert str(client.value) == str(server.value) == str(expected.value)
    assert plan.value.code == 2
    assert " ".join(str(expected.value).partition("\n")[0].split()) in printed


@pytest.mark.parametrize(
    ("model_type", "published", "name", "is_read"),
    [
        ("llama", False, "model.layers.3.self_attn.k_scale", True),
        ("llama", False, "model.layers.3.mlp.extra.weight", True),
        ("llama", False, "layers.3.mlp.up_proj.weight_scale", True),
        ("llama", False, "model.embed_tokens.weight_scale", True),
        ("llama", False, "model.norm.bias", True),
        ("llama", False, "lm_head.weight_scale", True),
        ("bloom", True, "h.1.mlp.dense_h_to_4h.weight_scale", True),
        ("mixtral", True, "model.layers.1.block_sparse_moe.experts.0.w1.weight_scale", True),
        ("gemma3", False, "model.language_model.layers.0.mlp.up_proj.weight_scale", True),
        ("llama", False, "model.layers.5.mlp.up_proj.weight_scale", False),
        ("llama", False, "mtp.layers.0.weight", False),
        ("gemma3", False, "model.vision_tower.weight_scale", False),
        ("llama", False, "model.layers.3.self_attn.rotary_emb.inv_freq", False),
        ("falcon", False, "transformer.h.0.self_attention.rotary_emb.inv_freq", False),
        ("gpt2", False, "transformer.h.0.attn.bias", False),
        ("gpt2", False, "h.0.attn.masked_bias", False),
        ("gptj", False, "transformer.h.0.attn.masked_bias", False),
        ("gpt_neox", False, "gpt_neox.layers.0.attention.masked_bias", False),
        ("gpt_neox", False, "gpt_neox.layers.0.attention.rotary_emb.inv_freq", False),
        ("gpt_neo", False, "transformer.h.0.attn.attention.bias", False),
        ("codegen", False, "transformer.h.0.attn.causal_mask", False),
        ("llama", False, "model.layers.0.self_attn.core_attention._extra_state", False),
    ],
)
def test_a_tensor_that_nothing_takes(
    edited: WriteModel, model_type: str, published: bool, name: str, is_read: bool
) -> None:
    """Fatal in a block or beside a loaded parameter; not among what transformers computes."""
    folder = edited(model_type)
    if published:
        folder = edited(model_type, published=True)
    shard = next(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor | None] = {**load_file(shard), name: torch.ones(1)}
    add_tensor(folder, shard, name, tensors)
    checkpoint = open_checkpoint(str(folder))
    if is_read:
        with pytest.raises(ModelFilesBroken, match=f"holds {name}, which transformers"):
            check_weights(checkpoint)
    else:
        check_weights(checkpoint)


def add_tensor(folder: Path, shard: Path, name: str, tensors: dict[str, Any]) -> None:
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"][name] = shard.name
        index.write_text(json.dumps(values))


@pytest.mark.parametrize("settings", [formats.FP8, formats.MXFP4])
def test_without_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    for module in (quantizer_finegrained_fp8, quantizer_mxfp4):
        monkeypatch.setattr(module, "is_accelerate_available", lambda *version: False)
    folder = formats.write_quantized(tmp_path, settings)
    with pytest.raises(ModelNotSupported, match="pip install accelerate"):
        check_weights(open_checkpoint(str(folder)))


def test_no_weight_is_read(tmp_path: Path) -> None:
    """An index is enough: the refusal comes before the files with weights are downloaded."""
    folder = formats.write_quantized(tmp_path, None, formats.fp8_tensors)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesBroken, match="input_scale and 69 more"):
        check_weights(open_checkpoint(str(folder)))


def test_weights_are_quantized_once(tmp_path: Path, tiny_folder: WriteModel) -> None:
    plain = open_checkpoint(str(tiny_folder("llama")))
    check_quant(plain, QuantKind.NF4)
    undone = open_checkpoint(
        str(formats.write_quantized(tmp_path / "fp8", formats.FP8, formats.fp8_blocks))
    )
    check_quant(undone, QuantKind.INT8)
    with pytest.raises(ConfigError, match=r"quantized already \(fp8\), so nf4"):
        check_quant(undone, QuantKind.NF4)
    kept = open_checkpoint(str(formats.write_bitsandbytes(tmp_path, load_in_8bit=True)))
    with pytest.raises(ConfigError, match=r"quantized already \(bitsandbytes\), so int8"):
        check_quant(kept, QuantKind.INT8)


def test_costs_of_what_is_in_memory(tmp_path: Path) -> None:
    """fp8 is dequantized on CPUs: its matrices take the bytes of the dtype, not one byte."""
    checkpoint = open_checkpoint(
        str(formats.write_quantized(tmp_path, formats.FP8, formats.fp8_blocks))
    )
    costs = block_costs(config_in_memory(checkpoint, "cpu"), dtype=torch.float32)
    layers = load_blocks(checkpoint, BlockSpan(0, 5)).layers
    held = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    assert [cost.weight_bytes for cost in costs] == held
