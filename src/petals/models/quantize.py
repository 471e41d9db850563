"""Narrow weights: dynamic int8 for CPUs that does not care who shares the batch, bitsandbytes elsewhere.

Knows nothing of spans, sessions or files; it swaps the linear layers of any module.
"""

from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from petals.errors import ConfigError


class QuantKind(StrEnum):
    """How the matrices of blocks are stored."""

    NONE = "none"
    INT8 = "int8"
    BNB_INT8 = "bnb-int8"
    NF4 = "nf4"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output channel, for x86 CPUs.

    The kernel takes one activation scale for the whole batch. Each row is therefore divided by its
    largest magnitude and one row holding +1 and -1 pins the range, so that a row's output is the
    same bits whatever rows are beside it. Inference only: the kernel has no gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127.0).clamp_min(1e-12).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        packed = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.bias = bias
        self.packed = torch.ops.quantized.linear_prepack(packed, None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features).float()
        peaks = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        pin = torch.zeros(1, self.in_features)
        pin[0, 0], pin[0, -1] = 1.0, -1.0
        scaled = torch.ops.quantized.linear_dynamic(torch.cat((rows / peaks, pin)), self.packed)
        output = scaled[:-1] * peaks
        if self.bias is not None:
            output += self.bias
        return output.to(hidden.dtype).reshape(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantize_linears(root: nn.Module) -> int:
    """Replace every ``nn.Linear`` (and GPT-2's transposed kind) below ``root``; returns how many."""
    swapped = 0
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features > 1:
                setattr(module, name, Int8Linear(child))
                swapped += 1
    return swapped


def quantization_config_for(kind: QuantKind) -> Any:
    """The transformers quantization config of a kind that transformers applies, else None.

    Raises ConfigError if the kind needs bitsandbytes and it is not installed.
    """
    if kind not in (QuantKind.BNB_INT8, QuantKind.NF4):
        return None
    if not is_bitsandbytes_available():
        raise ConfigError(
            f"Quantization {kind} needs the package bitsandbytes.",
            hint="pip install 'petals[quant]', or use --quant int8 on a CPU.",
        )
    if kind is QuantKind.BNB_INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
