"""Base-128 integers as libp2p writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.wire import varint


@pytest.mark.parametrize(
    ("value", "encoded"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")]
)
def test_known_encodings(value: int, encoded: bytes) -> None:
    assert varint.encode(value) == encoded


@given(st.integers(0, 2**63 - 1), st.binary(max_size=4))
def test_a_number_is_read_back_whatever_follows(value: int, rest: bytes) -> None:
    encoded = varint.encode(value)
    assert varint.decode(encoded + rest) == (value, len(encoded))
    whole = [varint.is_whole(encoded[:end]) for end in range(len(encoded) + 1)]
    assert whole == [False] * len(encoded) + [True]


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 20])
def test_what_is_no_number(data: bytes) -> None:
    with pytest.raises(ValueError, match="varint"):
        varint.decode(data)


def test_an_endless_number_ends_the_reading() -> None:
    assert varint.is_whole(b"\xff" * varint.MAX_BYTES)
