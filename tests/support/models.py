"""Whole tiny models with random weights, as spans."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModel

from petals.models.loading.quantize import QuantKind
from petals.models.runtime.span import Span
from petals.models.verify.tiny import HIDDEN_SIZE, tiny_config
from petals.types import BlockSpan

WriteModel = Callable[..., Path]
"""The fixture `tiny_folder`: (model_type, layout=None) -> folder."""

WIDTH = HIDDEN_SIZE
NUM_BLOCKS = 4

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
    torch.manual_seed(0)
    config = tiny_config(name, **{"num_hidden_layers": NUM_BLOCKS, **overrides})
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    loaded = SimpleNamespace(
        base=model,
        layers=model.layers if hasattr(model, "layers") else model.h,
        config=config,
        blocks=BlockSpan(10, 10 + NUM_BLOCKS),
        dtype=torch.float32,
        quant=QuantKind.NONE,
    )
    return Span(loaded)
