"""What any peer receives: the first frames of a stream, refusals, and calls for reachability."""

from typing import Annotated

from msgspec import Meta

from petals.errors import PetalsError, from_wire
from petals.wire.fields import Message, Position, ShortText, Text, Ticket
from petals.wire.header import RequestHeader


class Hello(Message, frozen=True):
    """First frame of every stream, from the side that opened it."""

    version: Position
    service: ShortText
    ticket: Ticket = b""
    agent: ShortText = ""


class Welcome(Message, frozen=True):
    """The stream is admitted; the ticket proves that the answering side is a member, too."""

    version: Position
    agent: ShortText = ""
    ticket: Ticket = b""


class Refusal(Message, frozen=True):
    """A typed error. With a ``header``: the answer to that request of a session, and the stream
    goes on. Without: the answer to the only request under way, or the last message of a stream.
    """

    code: ShortText
    message: Text
    hint: Text = ""
    header: RequestHeader | None = None

    @classmethod
    def of(cls, error: PetalsError, header: RequestHeader | None = None) -> "Refusal":
        return cls(error.code, error.message[:4096], error.hint[:4096], header)

    def to_error(self, peer_id: str) -> PetalsError:
        """The error that the peer reported. Its text is the peer's, not ours."""
        return from_wire(self.code, self.message, self.hint, peer_id)


class DialBack(Message, frozen=True):
    """Ask a peer to open a stream to us at these addresses (are we reachable?)."""

    addresses: Annotated[tuple[ShortText, ...], Meta(max_length=16)]


class DialedBack(Message, frozen=True):
    """Whether the peer reached us, and the time on its clock (seconds since the epoch, for the
    skew).
    """

    reached: bool
    wall_clock_seconds: float
