"""Idle channels to peers, kept open so that most requests need no handshake.

Knows peers and services; knows no messages.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from petals.errors import RequestError, SessionError
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId

_KEPT_PER_PEER = 4
"""Most idle channels per peer and service; more are closed when they are given back."""


class ChannelPool:
    """Idle channels by peer and service. Belongs to one event loop; ``close`` ends them.

    ``silence_seconds``: time without any frame from a peer, while a reply is due, after which its
    channel counts as dead.
    """

    def __init__(self, node: SwarmNode, silence_seconds: float) -> None:
        self._node = node
        self._silence_seconds = silence_seconds
        self._idle: dict[tuple[PeerId, str], list[Channel]] = {}
        self._is_closed = False

    async def take(self, peer: PeerId, service: str, timeout: float) -> Channel:
        """A channel for the caller alone: ``give`` it back without pending replies, or close it.

        ``timeout`` (s) limits the opening of a new one. Raises what ``SwarmNode.open_channel``
        raises.
        """
        idle = self._idle.get((peer, service), [])
        while idle:
            channel = idle.pop()
            if not channel.is_closed:
                return channel
        channel = await self._node.open_channel(peer, service, timeout)
        channel.silence_seconds = self._silence_seconds
        return channel

    @asynccontextmanager
    async def lent(self, peer: PeerId, service: str, timeout: float) -> AsyncIterator[Channel]:
        """A channel for whole exchanges, given back after the block. Raises like ``take``.

        After RequestError and SessionError, which are replies, the channel is kept.
        """
        channel = await self.take(peer, service, timeout)
        try:
            yield channel
        except (RequestError, SessionError):
            await self.give(channel)
            raise
        except BaseException:
            await channel.close()  # a late reply would be taken for the next request's
            raise
        await self.give(channel)

    async def give(self, channel: Channel) -> None:
        """Take back a channel without pending replies."""
        idle = self._idle.setdefault((channel.peer_id, channel.service), [])
        if len(idle) < _KEPT_PER_PEER and not self._is_closed:
            idle.append(channel)
        else:
            await channel.close()

    async def close(self) -> None:
        """Close all idle channels, and those that are given back later."""
        self._is_closed = True
        channels = [channel for idle in self._idle.values() for channel in idle]
        self._idle.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
