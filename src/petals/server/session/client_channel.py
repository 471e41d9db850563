"""Messages to a client, on one channel that the client has opened.

Every reply of a server is sent here; ``reply`` is the one place that gives it a header. Knows
streams and messages; knows no sessions.
"""

import asyncio
from collections.abc import Callable, Sequence

from torch import Tensor

from petals.errors import PeerError, PeerTimeout
from petals.logs import get_logger
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.header import RequestHeader

logger = get_logger(__name__)

MakeReply = Callable[[RequestHeader], Message]
"""Makes a reply that carries the given header."""


class ClientChannel:
    """One channel of a client. ``number``: how many channels the server accepted before it.
    ``send_seconds``: base of the time limit of a message, see ``Channel.send``.

    No method raises because the client is gone: the client's sessions wait for it to come back. A
    client that does not take a message in time loses the channel, so that it cannot hold a step or
    the memory of its answer.
    """

    def __init__(self, channel: Channel, number: int, send_seconds: float) -> None:
        self._number = number
        self._channel = channel
        channel.send_seconds = send_seconds
        # The time limit of a message counts from the moment when the messages before it are sent.
        self._in_order = asyncio.Lock()

    @property
    def peer_id(self) -> PeerId:
        return self._channel.peer_id

    @property
    def is_open(self) -> bool:
        return not self._channel.is_closed

    def is_newer_than(self, other: "ClientChannel") -> bool:
        """Whether this channel is open and was opened after ``other``."""
        return self.is_open and self._number > other._number

    async def reply(
        self, header: RequestHeader, make: MakeReply, tensors: Sequence[Tensor] = ()
    ) -> None:
        """Answer the request that came with ``header``. Raises RequestTooLarge."""
        await self.send(make(header), tensors)

    async def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send a message that belongs to no session. Raises RequestTooLarge."""
        try:
            async with self._in_order:
                await self._channel.send(message, tensors)
        except PeerTimeout as error:
            # The channel ends, not only the message: what is sent on a channel arrives completely
            # and in order, or the client sees that the channel has ended.
            self._channel.abort(error)
        except PeerError as error:
            logger.debug("%s did not reach its client: %s", type(message).__name__, error.message)
