"""The bytes of every stream: frames, and the messages and the list of tensors in them.

::

    +------+-------------+------------------+
    | kind | length      | payload          |
    | u8   | u32 big-end | length bytes     |
    +------+-------------+------------------+

A MESSAGE frame carries a typed message (``wire.messages``) and the specs of the tensors that follow
it; their bytes (``wire.tensors``) follow in CHUNK frames, in order. CREDIT allows the sender that
number of further bytes: a chunk costs its length, a message its payload and ``MESSAGE_COST_BYTES``.
PING and PONG carry an 8-byte nonce. CANCEL ends the message that is being sent (its remaining
chunks will not come). Everything is checked before memory is allocated for it. Must not know
sockets and torch.
"""

import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from petals.errors import ProtocolError
from petals.wire.fields import MAX_TENSORS, Message
from petals.wire.messages import AnyMessage

PROTOCOL_VERSION = 9
"""Incremented with every change of ``wire`` that an older peer would misread."""

MAX_HEADER_BYTES = 256 * 1024
"""Largest MESSAGE payload; tensors travel in chunks."""

MAX_CHUNK_BYTES = 1024 * 1024
"""Largest CHUNK payload."""

CHUNK_BYTES = 512 * 1024
"""Size of the chunks that are sent: large enough for little overhead, small enough that a PONG does
not wait long behind one.
"""

HEADER = struct.Struct("!BI")

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


class FrameKind(IntEnum):
    """What a frame is; the number on the wire."""

    MESSAGE = 1
    CHUNK = 2
    CREDIT = 3
    PING = 4
    PONG = 5
    CANCEL = 6


_KINDS = {kind.value: kind for kind in FrameKind}
_MAX_PAYLOAD = {
    FrameKind.MESSAGE: MAX_HEADER_BYTES,
    FrameKind.CHUNK: MAX_CHUNK_BYTES,
    FrameKind.CREDIT: 4,
    FrameKind.PING: 8,
    FrameKind.PONG: 8,
    FrameKind.CANCEL: 0,
}
_EXACT_PAYLOAD = {FrameKind.CREDIT: 4, FrameKind.PING: 8, FrameKind.PONG: 8, FrameKind.CANCEL: 0}
_U32 = struct.Struct("!I")


def encode_header(kind: FrameKind, length: int) -> bytes:
    """The 5 bytes before a payload of ``length`` bytes."""
    return HEADER.pack(kind, length)


def decode_header(header: bytes) -> tuple[FrameKind, int]:
    """5 bytes -> (kind, payload length). Raises ProtocolError before anything of that length is
    allocated.
    """
    number, length = HEADER.unpack(header)
    kind = _KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"Frame kind {number} does not exist.")
    if length > _MAX_PAYLOAD[kind] or length != _EXACT_PAYLOAD.get(kind, length):
        raise ProtocolError(f"A {kind.name} frame of {length} bytes is not allowed.")
    return kind, length


def encode_frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    """Header and payload in one piece, for small frames."""
    return HEADER.pack(kind, len(payload)) + payload


def encode_credit(num_bytes: int) -> bytes:
    """A CREDIT frame for ``num_bytes`` further bytes (at most 2**32 - 1)."""
    return encode_frame(FrameKind.CREDIT, _U32.pack(num_bytes))


def decode_credit(payload: bytes) -> int:
    """Payload of a CREDIT frame -> bytes granted."""
    return int(_U32.unpack(payload)[0])


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


Specs = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[AnyMessage, Specs])


def encode_message(message: Message, specs: tuple[TensorSpec, ...] = ()) -> bytes:
    """Payload of a MESSAGE frame."""
    return _encoder.encode((message, specs))


def decode_message(payload: bytes) -> tuple[AnyMessage, tuple[TensorSpec, ...]]:
    """Payload of a MESSAGE frame -> message and specs of the tensors that follow. Raises
    ProtocolError.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A message could not be read: {error}") from error


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
