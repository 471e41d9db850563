"""The way back to a client: the channel that it was heard on last.

Knows streams and messages, no sessions.
"""

from collections.abc import Sequence

from torch import Tensor

from petals.errors import PeerError
from petals.logs import get_logger
from petals.swarm.rpc.channel import Channel
from petals.wire.fields import Message

logger = get_logger(__name__)


class ClientChannel:
    """Answers on the client's own channel.

    Nothing here raises because the client has gone: its sessions wait for it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def is_open(self) -> bool:
        return not self._channel.is_closed

    async def answer(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send, unless the client has gone. Raises RequestTooLarge."""
        try:
            await self._channel.send(message, tensors)
        except PeerError as error:
            logger.debug("%s found nobody to take it: %s", type(message).__name__, error.message)
