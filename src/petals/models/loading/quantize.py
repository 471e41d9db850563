"""Quantized weights: int8 on CPUs, with results that do not depend on the batch; bitsandbytes.

Replaces the linear layers of any module and measures which precision is fastest. Knows nothing of
spans, sessions or files.
"""

import time
import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from petals.errors import ConfigError
from petals.models.loading.measure import Stopwatch, best_seconds

_INT8_MAX = 127.0
_SMALLEST_SCALE = 1e-12
"""Smallest scale of an output channel, so that a channel of zeros does not divide by zero."""

_PROBE_IN, _PROBE_OUT = 2048, 2048
_PROBE_ROWS = (1, 8)
"""Tokens of the two products that are measured: decoding of one session and of a small batch."""


class QuantKind(StrEnum):
    """How the matrices of blocks are stored."""

    NONE = "none"
    INT8 = "int8"
    BNB_INT8 = "bnb-int8"
    NF4 = "nf4"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output channel, for x86 CPUs.

    ``[..., in]`` of any float dtype -> ``[..., out]`` of the same dtype. The kernel quantizes
    activations with one scale for the whole batch, taken from the smallest and largest value in it:
    the output of one session would depend on the sessions beside it. Each row is therefore divided
    by its largest magnitude, and one additional row with the values +1 and -1 fixes the range of
    every batch to [-1, 1]. Inference only: the kernel has no gradient.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scales = (wide.abs().amax(dim=1) / _INT8_MAX).clamp_min(_SMALLEST_SCALE).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch announces the removal of this way to make a quantized tensor, not of the kernel.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(wide, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features).float()
        # clamp_min lets a row of zeros stay zeros.
        peaks = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        range_row = torch.zeros(1, self.in_features)
        range_row[0, 0], range_row[0, -1] = 1.0, -1.0
        batch = torch.cat((rows / peaks, range_row))
        # reduce_range: activations of 7 bits. With 8 bits, CPUs without VNNI overflow 16 bits where
        # they add two products.
        output = torch.ops.quantized.linear_dynamic(batch, self.packed, reduce_range=True)
        output = output[:-1] * peaks
        if self.bias is not None:
            output += self.bias
        return output.to(hidden.dtype).reshape(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantize_linears(root: nn.Module) -> int:
    """Replace every linear layer below ``root`` by an ``Int8Linear``; returns how many.

    GPT-2's transposed layers are replaced, too. Fused experts are no linear layers and stay as they
    are.
    """
    num_replaced = 0
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            quantized = _quantized(child)
            if quantized is not None:
                setattr(module, name, quantized)
                num_replaced += 1
    return num_replaced


def _quantized(module: nn.Module) -> Int8Linear | None:
    # Subclasses may compute something else. The range row needs two columns, for +1 and -1.
    if type(module) is nn.Linear and module.in_features > 1:
        return Int8Linear(module.weight, module.bias)
    if type(module) is Conv1D and module.nx > 1:
        return Int8Linear(module.weight.t(), module.bias)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionChoice:
    """The precision in which a device computes fastest.

    ``seconds``: for each candidate (by name) the time (s) of one token plus one small batch through
    one matrix.
    """

    dtype: torch.dtype
    quant: QuantKind
    seconds: dict[str, float]


def choose_precision(
    device: str = "cpu", *, lossy: bool = True, stopwatch: Stopwatch = time.perf_counter
) -> PrecisionChoice:
    """Measure f32, bf16 and, on a CPU, int8 for about a second and choose the fastest.

    Each candidate multiplies one token and a small batch, the usual loads of a server. ``lossy``
    False leaves int8 out, which rounds the weights of the checkpoint.
    """
    probes: dict[tuple[torch.dtype, QuantKind], nn.Module] = {}
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(_PROBE_IN, _PROBE_OUT, bias=False, device=device, dtype=dtype)
        probes[dtype, QuantKind.NONE] = linear
    if device == "cpu" and lossy and "fbgemm" in torch.backends.quantized.supported_engines:
        weight = probes[torch.float32, QuantKind.NONE].get_parameter("weight")
        probes[torch.float32, QuantKind.INT8] = Int8Linear(weight, None)
    seconds = {
        key: _probe_seconds(key[0], probe, device, stopwatch) for key, probe in probes.items()
    }
    dtype, quant = min(seconds, key=lambda key: seconds[key])
    named = {_label(*key): taken for key, taken in seconds.items()}
    return PrecisionChoice(dtype=dtype, quant=quant, seconds=named)


def quantization_config_for(kind: QuantKind, compute: torch.dtype) -> Any:
    """The transformers quantization config of ``kind``; None if transformers does not apply it.

    ``compute``: the dtype that 4-bit weights are converted to for a product. Raises ConfigError if
    ``kind`` needs bitsandbytes and it is not installed.
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
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def fix_4bit_layers(model: nn.Module) -> None:
    """Make 4-bit layers of bitsandbytes on a CPU compute with the weights that were quantized.

    bitsandbytes 0.50 repacks such a layer on CPUs with AVX512-BF16 at its first call without
    gradients. This rounds the scales to bf16, so that inference and training would no longer use
    the same weights; it is switched off. The CPU kernels also read wrong scales where the width of
    a matrix is not a multiple of the quantization block (64 values): raises ConfigError with the
    name of such a matrix.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state: Any = getattr(module.weight, "quant_state", None)
        on_cpu = state is not None and module.weight.device.type == "cpu"
        if on_cpu and state.shape[-1] % state.blocksize:
            raise ConfigError(
                f"bitsandbytes cannot compute {name} in 4 bits on a CPU: its width of "
                f"{state.shape[-1]} is not a multiple of {state.blocksize}.",
                hint="Use --quant int8, or a GPU.",
            )


def _probe_seconds(
    dtype: torch.dtype, probe: nn.Module, device: str, stopwatch: Stopwatch
) -> float:
    """Time (s) of one token plus one small batch through ``probe``."""
    total = 0.0
    for num_rows in _PROBE_ROWS:
        hidden = torch.randn(num_rows, _PROBE_IN, device=device, dtype=dtype)

        def multiply(hidden: torch.Tensor = hidden) -> float:
            # A GPU computes asynchronously: reading one value waits for the result.
            return probe(hidden)[0, 0].item()

        total += best_seconds([multiply], stopwatch)[0]
    return total


def _label(dtype: torch.dtype, quant: QuantKind) -> str:
    return str(quant) if quant is not QuantKind.NONE else str(dtype).removeprefix("torch.")
