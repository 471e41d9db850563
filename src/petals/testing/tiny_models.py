"""Random tiny checkpoints of any architecture, in the naming and sharding of published ones.

Norms and biases are perturbed, too: a tensor that a loader leaves at its initial value then changes
the output. For tests and examples; product code must not import it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from petals.models.verify.tiny import tiny_config

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointLayout:
    """How a checkpoint is written: ``rename`` maps the names of tensors to published ones.

    With ``num_shards`` > 1 the tensors are divided, in the order of their blocks, into that many
    files of about equal numbers of tensors, with an index beside them: each block is in one or two
    files.
    """

    rename: Callable[[str], str] = lambda name: name
    num_shards: int = 1


PUBLISHED: dict[str, CheckpointLayout] = {
    "bloom": CheckpointLayout(rename=lambda name: name.removeprefix("transformer."), num_shards=6),
    "mixtral": CheckpointLayout(num_shards=5),
    "deepseek_v3": CheckpointLayout(num_shards=5),
}
"""Layouts of the hub's checkpoints: BLOOM's names have no prefix, and there are several files."""


def write_tiny_model(
    folder: Path,
    model_type: str,
    *,
    layout: CheckpointLayout | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random f32 checkpoint of ``model_type`` into ``folder``; returns the folder.

    ``overrides`` change the (text) config, for example ``num_hidden_layers=7``. Raises
    ModelNotSupported if the installed transformers does not know the type.
    """
    model = tiny_model(tiny_config(model_type, **overrides), seed=seed)
    model.save_pretrained(folder)
    if layout is not None:
        rewrite(folder, layout)
    return folder


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The whole model of a config, in f32 with random weights, in eval mode."""
    wraps_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if wraps_text else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        perturb(model)
    return model.eval()


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Move every parameter and every stored float buffer away from its initial value."""
    stored = model.state_dict(keep_vars=True).values()
    for tensor in {tensor.data_ptr(): tensor for tensor in stored}.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)


def rewrite(folder: Path, layout: CheckpointLayout) -> None:
    """Write the weights of a saved checkpoint in another layout; the old files are removed."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    tensors = {layout.rename(name): tensor for name, tensor in tensors.items()}
    if layout.num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors, key=_block_order)
    size = -(-len(names) // layout.num_shards)
    weight_map: dict[str, str] = {}
    for number in range(layout.num_shards):
        file_name = f"model-{number + 1:05d}-of-{layout.num_shards:05d}.safetensors"
        shard = names[number * size : (number + 1) * size]
        save_file({name: tensors[name] for name in shard}, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _block_order(name: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.", f".{name}")
    return (int(number[1]) if number else -1, name)
