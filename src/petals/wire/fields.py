"""Types of message fields with their bounds, and the base of all messages.

Must not know any particular message.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from petals.types import SESSION_ID_BYTES

MAX_ROWS = 1024
"""Most rows of a session."""

MAX_TENSORS = 4096
"""Most tensors that follow one message."""

MAX_ROPE_RUNS = 16384
"""Most runs of tokens of one rope length in a message; a replay has at most as many tokens in a
part.
"""

MAX_POSITION = 2**31 - 1
"""Largest token position and block index."""

ShortText = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Ticket = Annotated[bytes, Meta(max_length=512)]
SessionKeyBytes = Annotated[bytes, Meta(min_length=SESSION_ID_BYTES, max_length=SESSION_ID_BYTES)]
Position = Annotated[int, Meta(ge=0, le=MAX_POSITION)]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
PerRow = Annotated[tuple[Position, ...], Meta(max_length=MAX_ROWS)]
RopeRun = tuple[Annotated[int, Meta(ge=1, le=MAX_POSITION)], Position]
"""Number of successive tokens, and their rope length."""
WireRopeRuns = Annotated[tuple[RopeRun, ...], Meta(max_length=MAX_ROPE_RUNS)]
PerBlock = Annotated[tuple[Position, ...], Meta(max_length=1024)]
PassId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
WireBlocks = tuple[Position, Position]
"""``(start, end)`` as it travels; ``span()`` turns it into a BlockSpan."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: on the wire, an array that begins with the class name."""
