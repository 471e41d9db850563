"""LoRA adapters in a packed batch, in which every segment may have another adapter or none.

A forward hook on a matrix reads the batch context and adds ``scaling * (x @ A.T) @ B.T`` to the
tokens of each segment that has an adapter for this matrix. Knows no files and no peers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from petals.errors import AdapterRefused
from petals.models.adapters.low_rank import Adapter, LowRank, Slot, Slots
from petals.models.checkpoint.arch import build_on_meta, describe
from petals.models.runtime.batch import BatchContext, current

_EXPERTS = "experts"
"""Name of the modules that get only the tokens routed to them, in another order: which segment a
token belongs to cannot be known there.
"""


def slots_of(layers: Iterable[nn.Module], first_block: int) -> Slots:
    """The matrices of ``layers`` that can take an adapter: linear layers, quantized or not.

    Works on the meta device, too. Experts are left out, fused or not.
    """
    return {
        (first_block + index, path): shape
        for index, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if _EXPERTS not in path.split(".") and (shape := _shape_of(module)) is not None
    }


def slots_of_model(config: PretrainedConfig) -> tuple[Slots, bool]:
    """The slots of all blocks of a model, and whether it stores matrices transposed (as GPT-2).

    Needs no weights. Raises ModelNotSupported.
    """
    arch = describe(config)
    layers = build_on_meta(arch.base_class, config).get_submodule(arch.layers_path)
    transposed = any(isinstance(module, Conv1D) for module in layers.modules())
    return slots_of(layers.children(), 0), transposed


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantized (int8, nf4, fp8) or not; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    num_in, num_out = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return (num_in, num_out) if isinstance(num_in, int) and isinstance(num_out, int) else None


class LoraHooks:
    """Hooks on the matrices of loaded blocks, added when the first adapter needs them.

    A hook costs time in every step, so blocks without adapters have none.
    """

    def __init__(self, layers: nn.ModuleList, first_block: int) -> None:
        self._layers = layers
        self._first_block = first_block
        self._hooked: set[Slot] = set()

    def add(self, adapter: Adapter) -> None:
        """Hook the slots of ``adapter``, which must exist. Idempotent."""
        if adapter.parts.keys() <= self._hooked:
            return
        for slot in adapter.parts.keys() - self._hooked:
            block, path = slot
            module = self._layers[block - self._first_block].get_submodule(path)
            module.register_forward_hook(_hook(slot))
            self._hooked.add(slot)


def _hook(slot: Slot) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        context = current()
        if context is None or not context.has_adapters:
            return output
        return _adapted(context, slot, inputs[0], output)

    return hook


def _adapted(
    context: BatchContext, slot: Slot, inputs: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """``output`` [..., out] with the adapters' products of ``inputs`` [..., in] added to it.

    Raises AdapterRefused if the module does not get all tokens of the batch in packed order.
    """
    # Segments with the same adapter are computed together; adjacent ones need no copy of inputs.
    adapted: dict[LowRank, list[slice]] = {}
    for segment, first, last in context.active:
        part = segment.adapter.parts.get(slot) if segment.adapter is not None else None
        if part is None:
            continue
        ranges = adapted.setdefault(part, [])
        if ranges and ranges[-1].stop == first:
            ranges[-1] = slice(ranges[-1].start, last)
        else:
            ranges.append(slice(first, last))
    if not adapted:
        return output
    if torch.is_grad_enabled():
        # The backward of some quantized layers forbids to change their output in place.
        output = output.clone()
    rows, sums = inputs.flatten(0, -2), output.flatten(0, -2)
    if rows.shape[0] != context.total:
        raise AdapterRefused(
            f"{slot[1]} of block {slot[0]} does not see every token, so it can take no adapter."
        )
    for part, ranges in adapted.items():
        own = torch.cat([rows[tokens] for tokens in ranges]) if len(ranges) > 1 else rows[ranges[0]]
        delta = (own.to(part.a.dtype) @ part.a.t()) @ part.b.t() * part.scaling
        done = 0
        for tokens in ranges:
            count = tokens.stop - tokens.start
            sums[tokens].add_(delta[done : done + count].to(sums.dtype))
            done += count
    return sums.view(output.shape)
