"""Tensors as bytes, and which values may travel.

A tensor travels as one contiguous little-endian row-major buffer described by a ``TensorSpec``;
nothing is ever pickled. Must not know sockets and messages.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from petals.errors import BadInput, ProtocolError
from petals.wire.frames import ITEM_BYTES, TensorSpec

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(tensor: torch.Tensor) -> tuple[TensorSpec, memoryview]:
    """Tensor (any device, any layout) -> its spec and its bytes on the wire.

    Raises ProtocolError for a dtype that does not travel.
    """
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"Tensors of dtype {tensor.dtype} do not travel.")
    spec = TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))
    # Few calls: between two batches nothing of this is in the processor's caches, and each costs
    # 20 to 50 microseconds.
    if tensor.dtype is torch.bfloat16:  # unknown to numpy
        tensor = tensor.view(torch.int16)
    array = tensor.contiguous().numpy(force=True)
    is_plain = array.ndim and array.size
    return spec, array.data.cast("B") if is_plain else memoryview(array.tobytes())


def decode(spec: TensorSpec, data: bytearray) -> torch.Tensor:
    """Bytes on the wire -> tensor of ``spec.dtype`` and ``spec.shape`` that owns ``data``.

    Raises ProtocolError if ``data`` is not ``spec.num_bytes`` long.
    """
    dtype = DTYPES[spec.dtype]
    if len(data) != spec.num_bytes:
        raise ProtocolError(f"A tensor of {spec.num_bytes} bytes arrived with {len(data)}.")
    if not data:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(spec.shape)


def narrowed(states: Tensor, dtype: torch.dtype) -> Tensor:
    """``states`` in ``dtype``. What float16 cannot hold becomes its largest value, as in hivemind;
    infinity and NaN stay what they are, so that they are noticed.
    """
    if dtype is not torch.float16 or states.dtype is torch.float16:
        return states.to(dtype)
    bound = torch.finfo(dtype).max
    return torch.where(states.isfinite(), states.clamp(-bound, bound), states).to(dtype)


def is_finite(values: Tensor) -> bool:
    """True if there is no NaN and no infinity."""
    # A finite sum proves it in one pass without a temporary; a sum may overflow, so it disproves
    # nothing.
    if not values.numel() or math.isfinite(values.sum().item()):
        return True
    return bool(torch.isfinite(values).all())


def check_states(hidden: Tensor) -> None:
    """Raises BadInput for states that are not floating point or not finite."""
    if not hidden.dtype.is_floating_point:
        raise BadInput(
            f"Hidden states are floating point, not {hidden.dtype}.",
            hint="Token ids go through the model's embeddings first.",
        )
    if not is_finite(hidden):
        raise BadInput(
            "Hidden states hold NaN or infinity.",
            hint="Check their source, for example prompts that diverged in training.",
        )


def what_is_wrong(
    answer: Sequence[Tensor],
    likes: Sequence[Tensor],
    *,
    any_dtype: bool = False,
    any_value: bool = False,
) -> str:
    """Why a server's answer cannot be what was computed for tensors ``likes``; empty if it can.

    ``any_dtype``: another floating dtype is not wrong. ``any_value``: NaN and infinity are not.
    """
    if len(answer) != len(likes):
        return f"{len(answer)} tensors instead of {len(likes)}"
    for tensor, like in zip(answer, likes):
        is_of_dtype = tensor.is_floating_point() if any_dtype else tensor.dtype == like.dtype
        if tensor.shape != like.shape or not is_of_dtype:
            return f"{tensor.dtype} {list(tensor.shape)} for {like.dtype} {list(like.shape)}"
        if not any_value and not is_finite(tensor):
            return "NaN or infinity"
    return ""
