"""Which way the matrices of blocks and heads lie in memory, chosen by measurement.

One token through a linear layer reads the whole matrix; on many CPUs that goes up to twice as fast
when it lies column by column, on others row by row. The values and the module stay the same, only
strides change. Knows no architecture.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

_MIN_GAIN = 1.08
_SAMPLE_BYTES = 96 * 2**20
_REPEATS = 5
_MIN_BYTES = 2**20
"""Smaller matrices stay in the processor's cache, where neither way is faster."""

Shape = tuple[int, int]


def orient_linears(layers: nn.Module) -> dict[Shape, bool]:
    """Turn the f32 matrices of CPU modules where that is faster; returns shape -> turned.

    Takes about a second and a copy of some matrices. Every parameter ends in memory of its own, so
    that none keeps a mapped checkpoint file in memory beside its turned copy.
    """
    by_shape: dict[Shape, list[nn.Linear]] = defaultdict(list)
    for module in layers.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            by_shape[module.out_features, module.in_features].append(module)
    turned = {shape: _is_faster_turned(linears) for shape, linears in by_shape.items()}
    if not any(turned.values()):
        return turned
    for shape, linears in by_shape.items():
        if turned[shape]:
            for linear in linears:
                linear.weight.data = _turn(linear.weight.data)
    for parameter in layers.parameters():
        if parameter.is_contiguous() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return turned


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.is_contiguous()


def _turn(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


def _is_faster_turned(linears: Sequence[nn.Linear]) -> bool:
    if linears[0].weight.nbytes < _MIN_BYTES:
        return False
    # Enough matrices that the cache of the processor does not hold them between two rounds.
    count = max(1, min(len(linears), _SAMPLE_BYTES // linears[0].weight.nbytes))
    rows = [linear.weight.detach() for linear in linears[:count]]
    columns = [_turn(weight) for weight in rows]
    token = torch.ones(1, rows[0].shape[1])
    with torch.inference_mode():
        taken = [(_seconds(rows, token), _seconds(columns, token)) for _ in range(_REPEATS)]
    return min(row for row, _ in taken) > _MIN_GAIN * min(column for _, column in taken)


def _seconds(weights: Sequence[torch.Tensor], token: torch.Tensor) -> float:
    started = time.perf_counter()
    for weight in weights:
        functional.linear(token, weight)
    return time.perf_counter() - started
