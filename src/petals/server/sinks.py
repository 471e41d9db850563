"""Where a step's output goes once it is ready.

Today back to the client on the stream its step came by; a ring adds a sink that passes it on to the
next hop, and sessions notice no difference. Knows streams and messages, no sessions.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from petals.errors import PeerError, PetalsError
from petals.logs import get_logger
from petals.swarm.channel import Channel
from petals.types import SessionId
from petals.wire.messages import Message, Refusal, SessionEnded, StepResult

logger = get_logger(__name__)


class Sink(Protocol):
    """Takes what a session gives.

    Nothing here raises because a peer has gone: its session waits for it.
    """

    async def deliver(self, result: StepResult, hidden: Tensor) -> None:
        """hidden: [tokens, H] on the CPU."""
        ...

    async def refuse(self, error: PetalsError, step_id: int) -> None:
        """The step cannot be done; the session stays as it was."""
        ...

    async def end(self, session_id: SessionId, reason: str) -> None:
        """The session exists no longer."""
        ...


class ClientSink:
    """Answers on the client's own channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def deliver(self, result: StepResult, hidden: Tensor) -> None:
        """See Sink.deliver."""
        await self.answer(result, (hidden,))

    async def refuse(self, error: PetalsError, step_id: int) -> None:
        """See Sink.refuse."""
        await self.answer(Refusal.of(error, step_id))

    async def end(self, session_id: SessionId, reason: str) -> None:
        """See Sink.end."""
        await self.answer(SessionEnded(session_id, reason))

    async def answer(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send, unless the client has gone. Raises RequestTooLarge."""
        try:
            await self._channel.send(message, tensors)
        except PeerError as error:
            logger.debug("%s found nobody to take it: %s", type(message).__name__, error.message)
