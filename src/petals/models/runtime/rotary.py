"""Rotary tables by rope length, where their factors depend on the length of a text.

Models with dynamic or LongRoPE scaling choose the factors by the largest position in the call. In a
packed batch a long row would change the results of short ones, and a piece of a prompt would get
other factors than the whole. So the table is computed once for all tokens whose rope lengths choose
the same factors (``rope_lengths``). Knows no architecture.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from petals.models.runtime.batch import current


def rotate_by_rope_length(base: nn.Module) -> int:
    """Wrap the rotary modules of ``base`` whose factors depend on the length of the text.

    Returns the length (tokens) above which all of these factors differ from those of short texts; 0
    if there are none.
    """
    longest = 0
    for module in base.modules():
        limits = [_limit(module, scaling) for scaling in _scalings(module)]
        if any(limits):
            longest = max(longest, *limits)
            scalings = _scalings(module)
            _wrap(module, _choice(module, scalings), any(map(_is_dynamic, scalings)))
    return longest


def _scalings(module: Any) -> list[dict[str, Any]]:
    """The rope parameters of a rotary module: one for all layers, or one per type of layer."""
    types = getattr(module, "rope_type", None)
    if isinstance(types, str):
        return [module.config.rope_parameters | {"rope_type": types}]
    if isinstance(types, dict):
        all_parameters = module.config.rope_parameters
        return [all_parameters[layer] | {"rope_type": kind} for layer, kind in types.items()]
    return []


def _limit(module: Any, scaling: dict[str, Any]) -> int:
    """The rope length up to which a scaling has the factors of short texts; 0: it has no others."""
    if _is_dynamic(scaling):
        return int(module.original_max_seq_len)
    is_long = scaling["rope_type"] == "longrope"
    return int(scaling["original_max_position_embeddings"]) if is_long else 0


def _is_dynamic(scaling: dict[str, Any]) -> bool:
    return "dynamic" in scaling["rope_type"]


def _choice(module: Any, scalings: list[dict[str, Any]]) -> Callable[[int], tuple[int, int]]:
    """A function of a rope length; lengths with the same value choose the same factors."""
    limits = sorted(_limit(module, scaling) for scaling in scalings if not _is_dynamic(scaling))
    # Dynamic scaling has other factors for every length from its limit on.
    grows = any(_is_dynamic(scaling) for scaling in scalings)
    first = module.original_max_seq_len if grows else 0

    def chosen(length: int) -> tuple[int, int]:
        return bisect_left(limits, length), max(length, first) if grows else 0

    return chosen


def _wrap(module: Any, chosen: Callable[[int], tuple[int, int]], grows: bool) -> None:
    own = module.forward

    def table(
        x: torch.Tensor, positions: torch.Tensor, length: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Tables [..., n, width] of positions [..., n] with the factors of ``length``."""
        # The module takes the length from the largest position, so a last one stands for it.
        last = positions.new_full((*positions.shape[:-1], 1), length - 1)
        if grows:
            _reset_frequencies(module)
        made = own(x, torch.cat([positions, last], dim=-1), *args, **kwargs)
        parts = (made,) if isinstance(made, torch.Tensor) else made
        return tuple(part[..., :-1, :] for part in parts)

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None:
            return own(x, position_ids, *args, **kwargs)
        groups: dict[tuple[int, int], list[int]] = {}
        lengths = context.rope_lengths()
        for index, length in enumerate(lengths):
            groups.setdefault(chosen(length), []).append(index)
        tables: tuple[torch.Tensor, ...] = ()
        for indices in groups.values():
            length = lengths[indices[0]]
            if len(groups) == 1:
                tables = table(x, position_ids, length, *args, **kwargs)
                break
            index = torch.tensor(indices, device=position_ids.device)
            parts = table(x, position_ids[..., index], length, *args, **kwargs)
            if not tables:
                tables = tuple(
                    part.new_empty((*part.shape[:-2], len(lengths), part.shape[-1]))
                    for part in parts
                )
            for whole, part in zip(tables, parts):
                whole[..., index, :] = part
        return tables[0] if len(tables) == 1 else tables

    module.forward = forward


def _reset_frequencies(module: Any) -> None:
    """Restore the initial frequencies of dynamic scaling.

    It keeps those of the longest text so far, which may be of another session.
    """
    for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", value)
        elif name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)


def dynamic_rope_limit(config: PretrainedConfig) -> int | None:
    """Tokens from which on dynamic rope scaling changes the factors; None without such scaling."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    is_dynamic = any("dynamic" in str(scaling.get("rope_type")) for scaling in scalings)
    return int(text.max_position_embeddings) if is_dynamic else None
