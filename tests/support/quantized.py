"""Tiny checkpoints in the quantized formats of the hub, written by each format's definition."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from petals.testing.tiny_models import write_tiny_model

Tensors = dict[str, Tensor]

FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""

FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
FP8_STATIC = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
        }
    },
    "ignore": ["lm_head"],
}


def write_quantized(
    folder: Path,
    settings: Any,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    model_type: str = "llama",
    *,
    stored: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A tiny model with ``settings`` as its quantization_config (none if None), its tensors
    replaced by ``change`` of them and, but for scales, ``stored`` in this dtype if they were f32.
    """
    write_tiny_model(folder, model_type, **overrides)
    file, config = folder / "model.safetensors", folder / "config.json"
    held = {}
    for name, tensor in change(load_file(file)).items():
        is_plain = tensor.dtype is torch.float32 and "scale" not in name
        held[name] = tensor.to(stored).contiguous() if is_plain else tensor.contiguous()
    save_file(held, file, metadata={"format": "pt"})
    values = json.loads(config.read_text()) | {"dtype": str(stored).removeprefix("torch.")}
    if settings is not None:
        values["quantization_config"] = settings
    config.write_text(json.dumps(values))
    return folder


def write_bitsandbytes(folder: Path, **settings: Any) -> Path:
    """A tiny model that transformers has quantized with bitsandbytes and saved."""
    plain = write_tiny_model(folder / "plain", "llama", **BNB_SIZES)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    model.save_pretrained(folder / "quantized")
    return folder / "quantized"


BNB_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
"""Widths that are multiples of the 64 values which share one scale in 4 bits."""


def _each_matrix(tensors: Tensors, change: Callable[[str, Tensor], Tensors]) -> Tensors:
    """``tensors`` with the matrices of blocks replaced by what ``change`` makes of them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        is_matrix = ".layers." in name and name.endswith("proj.weight") and tensor.dim() == 2
        found |= change(name, tensor) if is_matrix else {name: tensor}
    return found


def fp8_blocks(tensors: Tensors) -> Tensors:
    """One scale for each block of 8 x 8 values, as DeepSeek and Qwen publish (there 128 x 128)."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        blocks = weight.reshape(rows // 8, 8, columns // 8, 8)
        scales = blocks.abs().amax((1, 3)) / FP8_MAX
        values = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    return _each_matrix(tensors, quantized)


def fp8_tensors(
    tensors: Tensors, scale: str = "weight_scale", of_input: str = "input_scale"
) -> Tensors:
    """One scale for each matrix and one for its input: modelopt's names, or others."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        module = name.removesuffix("weight")
        factor = weight.abs().max() / FP8_MAX
        return {
            name: (weight / factor).to(torch.float8_e4m3fn),
            f"{module}{scale}": factor,
            f"{module}{of_input}": torch.tensor(0.01),
        }

    return _each_matrix(tensors, quantized)


def fp8_static(tensors: Tensors) -> Tensors:
    return fp8_tensors(tensors, "weight_scale_inv", "activation_scale")


def mxfp8(tensors: Tensors) -> Tensors:
    """One exponent (a byte) for 32 values of a row."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        groups = weight.unflatten(1, (-1, 32))
        exponents = torch.ceil(torch.log2(groups.abs().amax(2) / FP8_MAX))
        values = (groups / 2 ** exponents[..., None]).flatten(1)
        scales = (exponents + 127).to(torch.uint8)
        return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    return _each_matrix(tensors, quantized)


def mxfp4_experts(tensors: Tensors) -> Tensors:
    """Experts [e, in, out] as bytes [e, out, in / 32, 16] and exponents [e, out, in / 32]."""
    random = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        experts, width, height = tensor.shape
        shape = (experts, height, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8, generator=random)
        found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return found


def nvfp4(tensors: Tensors) -> Tensors:
    """modelopt's NVFP4: two values in a byte, an fp8 scale for 16 values, one f32 scale."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        return {
            name: torch.zeros(rows, columns // 2, dtype=torch.uint8),
            f"{name}_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            f"{name}_scale_2": torch.tensor(1.0),
            f"{name.removesuffix('weight')}input_scale": torch.tensor(1.0),
        }

    return _each_matrix(tensors, quantized)


def packed_words(tensors: Tensors) -> Tensors:
    """AWQ's and GPTQ's tensors: eight 4-bit values in a word, zeros and scales of 16 inputs."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        (rows, columns), module = weight.shape, name.removesuffix("weight")
        return {
            f"{module}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{module}qzeros": torch.zeros(columns // 16, rows // 8, dtype=torch.int32),
            f"{module}scales": torch.ones(columns // 16, rows, dtype=torch.float16),
            f"{module}g_idx": torch.arange(columns, dtype=torch.int32) // 16,
        }

    return _each_matrix(tensors, quantized)


def compressed(tensors: Tensors) -> Tensors:
    """compressed-tensors' pack-quantized format: 4-bit values in words, scales of 16 inputs."""

    def quantized(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        return {
            f"{name}_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
            f"{name}_scale": torch.ones(rows, columns // 16),
            f"{name}_shape": torch.tensor([rows, columns]),
        }

    return _each_matrix(tensors, quantized)
