"""Tensors as bytes.

A tensor travels as one contiguous little-endian row-major buffer described by a ``TensorSpec``;
nothing is ever pickled. Must not know sockets and messages.
"""

import torch

from petals.errors import ProtocolError
from petals.wire.specs import ITEM_BYTES, TensorSpec

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
