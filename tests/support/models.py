"""Whole tiny models with random weights, as spans."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from petals.models.adapters.low_rank import Adapter, LowRank
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.span import Span
from petals.models.verify.tiny import HIDDEN_SIZE, tiny_config
from petals.types import BlockSpan

WriteModel = Callable[..., Path]
"""The fixture `tiny_folder`: (model_type, layout=None) -> folder."""

WIDTH = HIDDEN_SIZE
BLOCKS = BlockSpan(10, 14)

ARCHITECTURES = (
    "llama",
    "mistral",
    "bloom",
    "gptj",
    "deepseek_v3",
    "mixtral",
    "falcon",
    "gemma2",
    "gpt_oss",
    "qwen3_next",
)
"""One for each way of attention and of choosing experts."""


def whole_model(name: str, **overrides: Any) -> Span:
    """All blocks of a tiny model, numbered 10..13, matrices large enough that every block changes
    its input. ``overrides`` change the config.
    """
    return part_of_model(name, BLOCKS, BLOCKS, **overrides)


def part_of_model(name: str, blocks: BlockSpan, whole: BlockSpan, **overrides: Any) -> Span:
    """``blocks`` of the tiny model whose blocks are ``whole``; see ``whole_model``."""
    config, model = _random_model(name, len(whole), **overrides)
    if blocks != whole:
        layers = _layers(model)[blocks.start - whole.start : blocks.end - whole.start]
        config, model = _random_model(name, len(blocks), **overrides)
        _layers(model).load_state_dict(layers.state_dict())
    loaded = SimpleNamespace(
        base=model,
        layers=_layers(model),
        config=config,
        blocks=blocks,
        dtype=torch.float32,
        quant=QuantKind.NONE,
    )
    return Span(loaded)


def _random_model(
    name: str, num_blocks: int, **overrides: Any
) -> tuple[PretrainedConfig, PreTrainedModel]:
    torch.manual_seed(0)
    config = tiny_config(name, **{"num_hidden_layers": num_blocks, **overrides})
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    return config, model


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.layers if hasattr(model, "layers") else model.h


def random_adapter(
    blocks: Iterable[int], rank: int = 3, seed: int = 0, module: str = "self_attn.q_proj"
) -> Adapter:
    """An adapter of one matrix in each of ``blocks`` of a tiny llama."""
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for block in blocks:
        a, b = (torch.randn(*shape, generator=random) for shape in ((rank, WIDTH), (WIDTH, rank)))
        parts[block, module] = LowRank(0.3 * a, 0.3 * b, 0.5)
    return Adapter(parts)
