"""What a peer says about a tensor before its bytes come: dtype, shape, codec, and so its size.

Checked before anything is allocated. Knows no torch: ``wire.tensors`` turns specs and bytes into
tensors.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from petals.errors import ProtocolError

MAX_DIMS = 8
INT8_BLOCK = 64
"""Values per scale in the int8 codec: 4 bytes of scale for 64 values costs 6 %."""

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The dtypes that travel, and the size of one value."""

_FLOATING = {"float32", "float16", "bfloat16"}


class Codec(StrEnum):
    """How the values are written. ``RAW`` is exact."""

    RAW = "raw"
    BF16 = "bf16"
    INT8 = "int8"


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
        return self.num_values * ITEM_BYTES[self.dtype]


def check_specs(specs: Sequence[TensorSpec], max_bytes: int) -> int:
    """Total bytes of what a peer announces. Raises ProtocolError before any of it is allocated."""
    total = 0
    for spec in specs:
        if spec.dtype not in ITEM_BYTES:
            raise ProtocolError(f"Tensors of dtype {spec.dtype[:32]!r} do not travel.")
        if len(spec.shape) > MAX_DIMS or any(not 0 <= n < 2**40 for n in spec.shape):
            raise ProtocolError("A tensor's shape is out of bounds.")
        if spec.codec is not Codec.RAW and spec.dtype not in _FLOATING:
            raise ProtocolError(f"Codec {spec.codec} is for floating point tensors.")
        total += spec.num_bytes
        if total > max_bytes:
            raise ProtocolError(f"A message may carry at most {max_bytes} bytes of tensors.")
    return total
