"""Chooses how the matrices of blocks lie in memory (row by row or column by column) by measuring.

One token through a linear layer reads the whole matrix, so decoding is limited by memory bandwidth.
Many CPUs read a matrix stored column by column up to twice as fast for this product, others are
faster row by row. Only strides change: values, shapes and modules stay the same. Knows no
architecture.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from petals.models.loading.measure import MIN_MATRIX_BYTES, is_clearly_faster

_SAMPLE_BYTES = 96 * 2**20
"""Size (bytes) of the matrices that one measurement reads: more than the processor's cache holds,
so that every repeat reads from memory, as a pass through all blocks does.
"""

Shape = tuple[int, int]
"""(out_features, in_features) of a linear layer."""


def choose_weight_layouts(layers: nn.Module) -> dict[Shape, bool]:
    """Store the f32 matrices of CPU modules column by column where that is clearly faster.

    Returns, for each shape, whether its matrices are stored column by column now. Takes about a
    second and, while it measures, copies of ``_SAMPLE_BYTES`` of matrices.
    """
    by_shape: dict[Shape, list[nn.Linear]] = defaultdict(list)
    for module in layers.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            by_shape[module.out_features, module.in_features].append(module)
    chosen = {shape: _is_faster_by_column(linears) for shape, linears in by_shape.items()}
    if not any(chosen.values()):
        return chosen
    for shape, linears in by_shape.items():
        if chosen[shape]:
            for linear in linears:
                linear.weight.data = by_column(linear.weight.data)
    # The other parameters are copied, too: they may be views of a mapped checkpoint file, whose
    # pages would otherwise stay in memory beside the copies just made.
    for parameter in layers.parameters():
        if parameter.is_contiguous() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return chosen


def by_column(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` [out, in] that is stored column by column."""
    return weight.t().contiguous().t()


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.is_contiguous()


def _is_faster_by_column(linears: Sequence[nn.Linear]) -> bool:
    """Whether one token through these layers of one shape is clearly faster by column."""
    weight_bytes = linears[0].weight.nbytes
    if weight_bytes < MIN_MATRIX_BYTES:
        return False
    count = max(1, min(len(linears), _SAMPLE_BYTES // weight_bytes))
    rows = [linear.weight.detach() for linear in linears[:count]]
    columns = [by_column(weight) for weight in rows]
    token = torch.ones(1, rows[0].shape[1])

    def multiply(weights: Sequence[torch.Tensor]) -> None:
        for weight in weights:
            functional.linear(token, weight)

    return is_clearly_faster(lambda: multiply(columns), lambda: multiply(rows))
