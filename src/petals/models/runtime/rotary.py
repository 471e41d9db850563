"""Rotary tables, computed per segment where their frequencies depend on the length of a text.

Models with dynamic or LongRoPE scaling choose the frequencies by the largest position in the batch.
In a packed batch a long segment would change the results of short ones, so the table is computed
segment by segment. Knows no architecture.
"""

from typing import Any

import torch
from torch import nn

from petals.models.runtime.batch import current


def rotate_per_segment(base: nn.Module) -> None:
    """Wrap the rotary modules of ``base`` whose frequencies depend on the length of the text."""
    for module in base.modules():
        types = _rope_types(module)
        is_dynamic = any("dynamic" in rope_type for rope_type in types)
        if is_dynamic or "longrope" in types:
            _wrap(module, is_dynamic)


def _rope_types(module: nn.Module) -> list[str]:
    """The scaling of a rotary module: one for all layers, or one per type of layer."""
    found = getattr(module, "rope_type", None)
    types = found.values() if isinstance(found, dict) else [found]
    return [rope_type for rope_type in types if isinstance(rope_type, str)]


def _wrap(module: nn.Module, is_dynamic: bool) -> None:
    own = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current()
        parts = context.parts if context is not None else [(None, 0, position_ids.shape[-1])]
        tables = []
        for _, first, last in parts:
            if is_dynamic:
                _reset_frequencies(module)
            tables.append(own(x, position_ids[..., first:last], *args, **kwargs))
        if isinstance(tables[0], torch.Tensor):
            return torch.cat(tables, dim=1)
        return tuple(torch.cat(pieces, dim=1) for pieces in zip(*tables))

    module.forward = forward


def _reset_frequencies(module: Any) -> None:
    """Restore the initial frequencies.

    Dynamic scaling keeps those of the longest text so far, which may be of another session.
    """
    for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", value)
        elif name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
