"""Frames: the cells every stream is made of.

::

    +------+-------------+------------------+
    | kind | length      | payload          |
    | u8   | u32 big-end | length bytes     |
    +------+-------------+------------------+

A MESSAGE frame carries a typed message (``wire.messages``) and the list of the tensors that follow
it; their bytes follow in CHUNK frames, in order. CREDIT gives the sender leave for so many more
bytes: chunks cost their length, messages their payload and a little more. PING and PONG carry an
8-byte nonce. CANCEL ends the message under way (its remaining chunks will not come). Knows no
sockets and no torch.
"""

import struct
from enum import IntEnum

from petals.errors import ProtocolError

PROTOCOL_VERSION = 8
"""Raised with every change of ``wire`` that an older peer would misread."""

MAX_HEADER_BYTES = 256 * 1024
"""Largest MESSAGE payload; messages are small, bulk travels in chunks."""

MAX_CHUNK_BYTES = 1024 * 1024
"""Largest CHUNK payload."""

CHUNK_BYTES = 512 * 1024
"""Chunk size we send: large enough that framing is free, small enough that a PONG never waits
long behind it.
"""

HEADER = struct.Struct("!BI")


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
    """A CREDIT frame for ``num_bytes`` more bytes (at most 2**32 - 1)."""
    return encode_frame(FrameKind.CREDIT, _U32.pack(num_bytes))


def decode_credit(payload: bytes) -> int:
    """Payload of a CREDIT frame -> bytes granted."""
    return int(_U32.unpack(payload)[0])
