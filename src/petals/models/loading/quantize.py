"""Narrow weights: dynamic int8 on CPUs, whoever shares the batch; bitsandbytes elsewhere.

Knows nothing of spans, sessions or files; it swaps the linear layers of any module.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from petals.errors import ConfigError

Stopwatch = Callable[[], float]
"""Seconds from some fixed point."""

_INT8_MAX = 127.0
_SMALLEST_SCALE = 1e-12
_PROBE_IN, _PROBE_OUT = 2048, 2048
_PROBE_ROWS = (1, 8)
_PROBE_REPEATS = 5


class QuantKind(StrEnum):
    """How the matrices of blocks are stored."""

    NONE = "none"
    INT8 = "int8"
    BNB_INT8 = "bnb-int8"
    NF4 = "nf4"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output channel, for x86 CPUs.

    ``[..., in]`` of any float dtype -> ``[..., out]`` of the same dtype. The kernel takes one
    activation scale for the whole batch. Each row is therefore divided by its largest magnitude
    and one row holding +1 and -1 pins the range, so that a row's output does not depend on the
    rows beside it. Inference only: the kernel has no gradient.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scales = (wide.abs().amax(dim=1) / _INT8_MAX).clamp_min(_SMALLEST_SCALE).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch plans to drop these makers of tensors; the kernel itself stays.
            warnings.simplefilter("ignore", UserWarning)
            narrow = torch.quantize_per_channel(wide, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(narrow, None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features).float()
        # A row of zeros has no direction to keep: any divisor does.
        peaks = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        pin = torch.zeros(1, self.in_features)
        pin[0, 0], pin[0, -1] = 1.0, -1.0
        batch = torch.cat((rows / peaks, pin))
        # Seven bits a value: with eight, CPUs without VNNI overflow where they add two products.
        output = torch.ops.quantized.linear_dynamic(batch, self.packed, reduce_range=True)
        output = output[:-1] * peaks
        if self.bias is not None:
            output += self.bias
        return output.to(hidden.dtype).reshape(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantize_linears(root: nn.Module) -> int:
    """Replace every linear layer below ``root``, GPT-2's transposed kind too; returns how many.

    Fused experts are no linear layers and stay as they are.
    """
    swapped = 0
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            narrow = _narrowed(child)
            if narrow is not None:
                setattr(module, name, narrow)
                swapped += 1
    return swapped


def _narrowed(module: nn.Module) -> Int8Linear | None:
    # Subclasses may compute something else; one column leaves no place for the pin's two ends.
    if type(module) is nn.Linear and module.in_features > 1:
        return Int8Linear(module.weight, module.bias)
    if type(module) is Conv1D and module.nx > 1:
        return Int8Linear(module.weight.t(), module.bias)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a device computes fastest, and the seconds each candidate took for its probe."""

    dtype: torch.dtype
    quant: QuantKind
    seconds: dict[str, float]


def fastest(
    device: str = "cpu", *, lossy: bool = True, clock: Stopwatch = time.perf_counter
) -> Choice:
    """Measure f32, bf16 and, on a CPU, int8 for about a second and choose.

    Each candidate multiplies one token and a small batch, the two shapes a server lives on.
    ``lossy`` False leaves int8 out, for those who want a checkpoint's own quality.
    """
    probes: dict[tuple[torch.dtype, QuantKind], nn.Module] = {}
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(_PROBE_IN, _PROBE_OUT, bias=False, device=device, dtype=dtype)
        probes[dtype, QuantKind.NONE] = linear
    if device == "cpu" and lossy and "fbgemm" in torch.backends.quantized.supported_engines:
        wide = probes[torch.float32, QuantKind.NONE].get_parameter("weight")
        probes[torch.float32, QuantKind.INT8] = Int8Linear(wide, None)
    taken = {key: _probe_seconds(key[0], probe, device, clock) for key, probe in probes.items()}
    dtype, quant = min(taken, key=lambda key: taken[key])
    named = {_label(*key): seconds for key, seconds in taken.items()}
    return Choice(dtype=dtype, quant=quant, seconds=named)


def quantization_config_for(kind: QuantKind, compute: torch.dtype) -> Any:
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
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def settle_4bit_layers(model: nn.Module) -> None:
    """Let 4-bit layers of bitsandbytes on a CPU compute with the weights that were quantized.

    bitsandbytes 0.50 repacks such a layer on CPUs with AVX512-BF16 at its first call without
    gradients; that rounds the scales to bf16, so that inference and training no longer use the
    same weights. It is switched off. Its CPU kernels also read wrong scales where the width of a
    matrix is not a multiple of the quantization block (64 values): ConfigError names the matrix.
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


def _probe_seconds(dtype: torch.dtype, probe: nn.Module, device: str, clock: Stopwatch) -> float:
    """Time of one token plus one small batch; the least of some repeats, since others run too."""
    total = 0.0
    with torch.inference_mode():
        for rows in _PROBE_ROWS:
            hidden = torch.randn(rows, _PROBE_IN, device=device, dtype=dtype)
            taken = []
            for _ in range(_PROBE_REPEATS):
                started = clock()
                # Reading one value back waits for a device that works on its own time.
                probe(hidden)[0, 0].item()
                taken.append(clock() - started)
            total += min(taken)
    return total


def _label(dtype: torch.dtype, quant: QuantKind) -> str:
    return str(quant) if quant is not QuantKind.NONE else str(dtype).removeprefix("torch.")
