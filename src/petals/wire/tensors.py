"""Tensors as bytes: dtype, shape, layout, codec.

A tensor travels as one contiguous little-endian row-major buffer described by a ``TensorSpec``; nothing is ever
pickled. Lossy codecs are the sender's choice per link (``Codec``); the receiver decodes into ``spec.dtype``.
Knows torch; knows no sockets and no messages.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec
import torch

from petals.errors import ProtocolError

MAX_DIMS = 8
INT8_BLOCK = 64
"""Values per scale in the int8 codec: 4 bytes of scale for 64 values costs 6 %."""


class Codec(StrEnum):
    """How the values are written. ``RAW`` is exact."""

    RAW = "raw"
    BF16 = "bf16"
    INT8 = "int8"


DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Shape, dtype and codec of one tensor that follows a message."""

    dtype: str
    shape: tuple[int, ...]
    codec: Codec = Codec.RAW

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        if self.codec is Codec.BF16:
            return 2 * self.num_values
        if self.codec is Codec.INT8:
            num_blocks = -(-self.num_values // INT8_BLOCK)
            return self.num_values + 4 * num_blocks
        return self.num_values * DTYPES[self.dtype].itemsize


def check_specs(specs: Sequence[TensorSpec], max_bytes: int) -> int:
    """Total bytes of what a peer announces. Raises ProtocolError before any of it is allocated."""
    total = 0
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ProtocolError(f"Tensors of dtype {spec.dtype[:32]!r} do not travel.")
        if len(spec.shape) > MAX_DIMS or any(not 0 <= n < 2**40 for n in spec.shape):
            raise ProtocolError("A tensor's shape is out of bounds.")
        if spec.codec is not Codec.RAW and not DTYPES[spec.dtype].is_floating_point:
            raise ProtocolError(f"Codec {spec.codec} is for floating point tensors.")
        total += spec.num_bytes
        if total > max_bytes:
            raise ProtocolError(f"Tensors of more than {max_bytes} bytes in one message are not allowed.")
    return total


def encode(tensor: torch.Tensor, codec: Codec = Codec.RAW) -> tuple[TensorSpec, memoryview]:
    """Tensor (any device, any layout) -> its spec and its bytes on the wire.

    Raises ProtocolError for a dtype that does not travel.
    """
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"Tensors of dtype {tensor.dtype} do not travel.")
    spec = TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape), codec)
    values = tensor.detach().cpu().contiguous()
    if codec is Codec.BF16:
        values = values.to(torch.bfloat16)
    elif codec is Codec.INT8:
        return spec, memoryview(_quantize(values.float().flatten()))
    return spec, _bytes_of(values)


def decode(spec: TensorSpec, data: bytearray) -> torch.Tensor:
    """Bytes on the wire -> tensor of ``spec.dtype`` and ``spec.shape`` that owns ``data``."""
    dtype = DTYPES[spec.dtype]
    if len(data) != spec.num_bytes:
        raise ProtocolError(f"A tensor of {spec.num_bytes} bytes arrived with {len(data)}.")
    if spec.num_values == 0:
        return torch.empty(spec.shape, dtype=dtype)
    if spec.codec is Codec.INT8:
        return _dequantize(data, spec.num_values).to(dtype).reshape(spec.shape)
    stored = torch.bfloat16 if spec.codec is Codec.BF16 else dtype
    return torch.frombuffer(data, dtype=stored).to(dtype).reshape(spec.shape)


def _bytes_of(values: torch.Tensor) -> memoryview:
    if values.numel() == 0:
        return memoryview(b"")
    return memoryview(values.reshape(-1).view(torch.uint8).numpy()).cast("B")


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
