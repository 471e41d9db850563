"""Memory for what is arriving: budgets, and the inbox that assembles messages.

Everything that a peer announces is counted before a byte of it is allocated. Must not know streams,
clock and tasks.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from petals.errors import PeerBusy, PetalsError, ProtocolError
from petals.swarm.config import ChannelLimits
from petals.types import PeerId
from petals.wire.frames import TensorSpec, check_specs, decode_message
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_BYTES = 8 * 1024 * 1024
"""Bytes that one side may send beyond what the other has taken. Part of the protocol."""

MESSAGE_COST_BYTES = 1024
"""Credit that a message costs beside its payload and tensors, so that empty ones are bounded."""

_SLACK_BYTES = 64 * 1024
"""Bytes that may exceed the credit: a refusal may be sent without credit."""

_GRANT_BYTES = WINDOW_BYTES // 4
"""Least credit (bytes) in one CREDIT frame, so that small messages cost no frames of their own."""


def message_cost(payload: bytes) -> int:
    """Credit that a MESSAGE frame costs its sender."""
    return len(payload) + MESSAGE_COST_BYTES


class Budget:
    """Bytes that may be arriving at this node, in all and from one peer."""

    def __init__(self, total_bytes: int, per_peer_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._per_peer_bytes = per_peer_bytes
        self._used: dict[PeerId, int] = {}
        self.used_bytes = 0

    def reserve(self, peer: PeerId, num_bytes: int) -> None:
        """Raises PeerBusy if there is no room."""
        used = self._used.get(peer, 0)
        if (
            used + num_bytes > self._per_peer_bytes
            or self.used_bytes + num_bytes > self._total_bytes
        ):
            raise PeerBusy("Too many bytes are under way to this peer.", hint="Send less at once.")
        self._used[peer] = used + num_bytes
        self.used_bytes += num_bytes

    def release(self, peer: PeerId, num_bytes: int) -> None:
        """Free what was reserved."""
        self.used_bytes -= num_bytes
        left = self._used.get(peer, 0) - num_bytes
        if left > 0:
            self._used[peer] = left
        else:
            self._used.pop(peer, None)


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A whole message; ``num_bytes`` of the budget are taken by it and its tensors, ``num_owed`` of
    credit are not yet granted again.
    """

    message: AnyMessage
    tensors: "list[Tensor]"
    num_bytes: int
    num_owed: int


@dataclass(slots=True)
class _Partial:
    """A message whose chunks are still arriving."""

    message: AnyMessage
    specs: tuple[TensorSpec, ...]
    num_bytes: int
    done: "list[Tensor]" = field(default_factory=list)
    buffer: bytearray = field(default_factory=bytearray)
    filled: int = 0
    num_owed: int = 0


class Inbox:
    """Messages of one channel, complete or arriving, within its limits."""

    def __init__(self, peer: PeerId, limits: ChannelLimits, budget: Budget) -> None:
        self._peer = peer
        self._limits = limits
        self._budget = budget
        self._ready: deque[ReceivedMessage] = deque()
        self._partial: _Partial | None = None
        self._unread_bytes = 0
        self._to_grant = 0

    @property
    def ready(self) -> bool:
        """True if a whole message waits."""
        return bool(self._ready)

    def make_room(self, num_bytes: int) -> None:
        """Reserve memory for a frame that is being read; ``arrived`` frees it. Raises PeerBusy."""
        self._budget.reserve(self._peer, num_bytes)

    def arrived(self, num_bytes: int) -> None:
        """The frame has been read, or never will be."""
        self._budget.release(self._peer, num_bytes)

    def begin(self, payload: bytes) -> None:
        """A MESSAGE frame arrived. Raises ProtocolError, or PeerBusy if there is no room."""
        if self._partial is not None:
            raise ProtocolError("A message began before the one under way was complete.")
        cost = message_cost(payload)
        self._count(cost)
        message, specs = decode_message(payload)
        total = cost + check_specs(specs, self._limits.max_tensor_bytes)
        self._budget.reserve(self._peer, total)
        self._partial = _Partial(message, specs, total, num_owed=cost)
        self._next_tensor(self._partial)

    def add_chunk(self, payload: bytes) -> None:
        """A CHUNK frame arrived: the next bytes of the tensor under way. Raises ProtocolError."""
        partial = self._partial
        if partial is None or not payload:
            raise ProtocolError("A chunk came without a message it could belong to.")
        self._count(len(payload))
        end = partial.filled + len(payload)
        if end > len(partial.buffer):
            raise ProtocolError("A chunk is longer than the rest of its tensor.")
        partial.buffer[partial.filled : end] = payload
        partial.filled = end
        partial.num_owed += len(payload)
        if end == len(partial.buffer):
            partial.done.append(_decode(partial.specs[len(partial.done)], partial.buffer))
            self._next_tensor(partial)

    def cancel(self) -> None:
        """A CANCEL frame arrived: the rest of the message will not come. Raises ProtocolError if
        there is none.
        """
        if self._partial is None:
            raise ProtocolError("There is no message to cancel.")
        self._return_credit(self._partial.num_owed)
        self.drop_partial()

    def pop(self) -> ReceivedMessage:
        """The oldest whole message."""
        received = self._ready.popleft()
        self._budget.release(self._peer, received.num_bytes)
        self._return_credit(received.num_owed)
        return received

    def take_grant(self, waiting: bool) -> int:
        """Credit (bytes) to grant now, 0 for none yet. ``waiting``: the owner waits for a message,
        so what arrives counts as taken.
        """
        if waiting and self._partial is not None and not self._ready:
            self._return_credit(self._partial.num_owed)
            self._partial.num_owed = 0
        if self._to_grant < _GRANT_BYTES:
            return 0
        granted, self._to_grant = self._to_grant, 0
        return granted

    def parting_refusal(self) -> PetalsError | None:
        """The peer's last message, if it is a refusal of the whole stream, as a typed error."""
        last = self._ready[-1].message if self._ready else None
        if isinstance(last, Refusal) and last.header is None:
            return last.to_error(self._peer)
        return None

    def drop_partial(self) -> None:
        """Drop the message that is arriving."""
        if self._partial is not None:
            self._budget.release(self._peer, self._partial.num_bytes)
            self._partial = None

    def clear(self) -> None:
        """Drop all messages."""
        self.drop_partial()
        while self._ready:
            self._budget.release(self._peer, self._ready.popleft().num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._unread_bytes += num_bytes
        if self._unread_bytes > WINDOW_BYTES + _SLACK_BYTES:
            raise ProtocolError("More was sent than there was credit for.")

    def _return_credit(self, num_bytes: int) -> None:
        self._unread_bytes -= num_bytes
        self._to_grant += num_bytes

    def _next_tensor(self, partial: _Partial) -> None:
        """Make room for the next tensor that has bytes; complete the message if there is none."""
        while len(partial.done) < len(partial.specs):
            spec = partial.specs[len(partial.done)]
            partial.buffer, partial.filled = bytearray(spec.num_bytes), 0
            if spec.num_bytes:
                return
            partial.done.append(_decode(spec, partial.buffer))
        self._partial = None
        self._ready.append(
            ReceivedMessage(partial.message, partial.done, partial.num_bytes, partial.num_owed)
        )


def _decode(spec: TensorSpec, data: bytearray) -> "Tensor":
    from petals.wire import tensors  # see channel.py: torch comes with the first tensor

    try:
        return tensors.decode(spec, data)
    except RuntimeError as error:  # torch's own bounds, for example strides beyond 64 bits
        raise ProtocolError(f"A tensor could not be built: {error}") from error
