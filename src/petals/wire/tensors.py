"""Tensors as bytes: layout and codec.

A tensor travels as one contiguous little-endian row-major buffer described by a ``TensorSpec``;
nothing is ever pickled. Lossy codecs are the sender's choice per link; the receiver decodes into
``spec.dtype``. Knows torch; knows no sockets and no messages.
"""

import torch

from petals.errors import ProtocolError
from petals.wire.specs import INT8_BLOCK, ITEM_BYTES, Codec, TensorSpec

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(tensor: torch.Tensor, codec: Codec = Codec.RAW) -> tuple[TensorSpec, memoryview]:
    """Tensor (any device, any layout) -> its spec and its bytes on the wire.

    Raises ProtocolError for a dtype that does not travel.
    """
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"Tensors of dtype {tensor.dtype} do not travel.")
    spec = TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape), codec)
    if codec is Codec.BF16:
        tensor = tensor.to(torch.bfloat16)
    elif codec is Codec.INT8:
        return spec, memoryview(_quantize(tensor.detach().cpu().float().flatten()))
    return spec, _bytes_of(tensor)


def decode(spec: TensorSpec, data: bytearray) -> torch.Tensor:
    """Bytes on the wire -> tensor of ``spec.dtype`` and ``spec.shape`` that owns ``data``."""
    dtype = DTYPES[spec.dtype]
    if len(data) != spec.num_bytes:
        raise ProtocolError(f"A tensor of {spec.num_bytes} bytes arrived with {len(data)}.")
    if not data:
        return torch.empty(spec.shape, dtype=dtype)
    if spec.codec is Codec.INT8:
        return _dequantize(data, spec.num_values).to(dtype).reshape(spec.shape)
    stored = torch.bfloat16 if spec.codec is Codec.BF16 else dtype
    values = torch.frombuffer(data, dtype=stored).view(spec.shape)
    return values if stored is dtype else values.to(dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    # Few calls: between two batches nothing of this is in the processor's caches, and each costs
    # 20 to 50 microseconds.
    if tensor.dtype is torch.bfloat16:  # unknown to numpy
        tensor = tensor.view(torch.int16)
    array = tensor.contiguous().numpy(force=True)
    return array.data.cast("B") if array.ndim and array.size else memoryview(array.tobytes())


def _quantize(values: torch.Tensor) -> bytearray:
    """Blockwise int8: one f32 scale (largest magnitude / 127) per 64 values, then the values."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % INT8_BLOCK)).view(-1, INT8_BLOCK)
    scales = padded.abs().amax(dim=1).clamp(min=1e-30) / 127
    quantized = (padded / scales[:, None]).round().to(torch.int8).flatten()[: len(values)]
    return bytearray(_bytes_of(scales)) + bytearray(_bytes_of(quantized))


def _dequantize(data: bytearray, num_values: int) -> torch.Tensor:
    num_blocks = -(-num_values // INT8_BLOCK)
    scales = torch.frombuffer(data, dtype=torch.float32, count=num_blocks)
    quantized = torch.frombuffer(data, dtype=torch.int8, offset=4 * num_blocks).float()
    padded = torch.nn.functional.pad(quantized, (0, -num_values % INT8_BLOCK)).view(-1, INT8_BLOCK)
    return (padded * scales[:, None]).flatten()[:num_values]
