"""What a peer says about a tensor before its bytes arrive: dtype and shape, and so its size.

Checked before memory is allocated. Must not know torch: ``wire.tensors`` turns specs and bytes into
tensors.
"""

import math
from collections.abc import Sequence

import msgspec

from petals.errors import ProtocolError

MAX_DIMS = 8
"""Most dimensions of a tensor that travels."""

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
"""The dtypes that travel, and the size of one value in bytes."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Shape and dtype of one tensor that follows a message."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return self.num_values * ITEM_BYTES[self.dtype]


def check_specs(specs: Sequence[TensorSpec], max_bytes: int) -> int:
    """Total bytes of what a peer announces. Raises ProtocolError if it is out of bounds."""
    total = 0
    for spec in specs:
        if spec.dtype not in ITEM_BYTES:
            raise ProtocolError(f"Tensors of dtype {spec.dtype[:32]!r} do not travel.")
        if len(spec.shape) > MAX_DIMS or any(not 0 <= n < 2**40 for n in spec.shape):
            raise ProtocolError("A tensor's shape is out of bounds.")
        total += spec.num_bytes
        if total > max_bytes:
            raise ProtocolError(f"A message may carry at most {max_bytes} bytes of tensors.")
    return total
