"""Rotary tables whose frequencies depend on how long a text is, kept per segment.

Models with dynamic or LongRoPE scaling choose frequencies by the largest position of the whole
batch. In a packed batch that would let a long session change its neighbours, so the table is
computed segment by segment. Knows no architecture.
"""

from typing import Any

import torch
from torch import nn

from petals.models.batch import current


def rotate_per_segment(base: nn.Module) -> None:
    """Wrap every rotary module of ``base`` whose frequencies depend on the length."""
    for module in base.modules():
        if _depends_on_length(getattr(module, "rope_type", None)):
            _wrap(module)


def _depends_on_length(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(k, str) and (k == "longrope" or "dynamic" in k) for k in kinds)


def _wrap(module: nn.Module) -> None:
    own = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None or len(context.parts) == 1:
            return own(x, position_ids, *args, **kwargs)
        tables = [
            own(x, position_ids[..., first:last], *args, **kwargs)
            for _, first, last in context.parts
        ]
        if isinstance(tables[0], torch.Tensor):
            return torch.cat(tables, dim=1)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*tables))

    module.forward = forward
