"""Rotary tables whose frequencies depend on how long a text is, kept per segment.

Models with dynamic or LongRoPE scaling choose frequencies by the largest position of the whole
batch. In a packed batch that would let a long session change its neighbours, so the table is
computed segment by segment. Knows no architecture.
"""

from typing import Any

import torch
from torch import nn

from petals.models.runtime.batch import current


def rotate_per_segment(base: nn.Module) -> None:
    """Wrap every rotary module of ``base`` whose frequencies depend on the length."""
    for module in base.modules():
        kinds = _kinds(getattr(module, "rope_type", None))
        if any("dynamic" in kind or kind == "longrope" for kind in kinds):
            _wrap(module, remembers=any("dynamic" in kind for kind in kinds))


def _kinds(rope_type: Any) -> list[str]:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return [kind for kind in kinds if isinstance(kind, str)]


def _wrap(module: nn.Module, remembers: bool) -> None:
    own = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current()
        parts = context.parts if context is not None else [(None, 0, position_ids.shape[-1])]
        tables = []
        for _, first, last in parts:
            if remembers:
                _forget_longer_texts(module)
            tables.append(own(x, position_ids[..., first:last], *args, **kwargs))
        if isinstance(tables[0], torch.Tensor):
            return torch.cat(tables, dim=1)
        return tuple(torch.cat(pieces, dim=1) for pieces in zip(*tables))

    module.forward = forward


def _forget_longer_texts(module: Any) -> None:
    """Dynamic scaling keeps the frequencies of the longest text so far, whoever's it was."""
    for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", value)
        elif name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
