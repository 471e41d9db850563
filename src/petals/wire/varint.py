"""Unsigned integers in base 128, low digits first, as protobuf and libp2p write them.

Pure.
"""

MAX_BYTES = 9
"""Longest encoding that is read: 63 bits."""


def encode(value: int) -> bytes:
    """Each byte holds seven bits; the top bit says that another byte follows."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def is_whole(data: bytes | bytearray) -> bool:
    """True if ``data``, read byte by byte, is a whole number, or longer than any may be."""
    return bool(data) and (data[-1] < 0x80 or len(data) >= MAX_BYTES)


def decode(data: bytes | bytearray) -> tuple[int, int]:
    """The number at the beginning of ``data`` and how many bytes it takes. Raises ValueError if
    there is none.
    """
    value = 0
    for index, byte in enumerate(data[:MAX_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    raise ValueError("not a varint")
