"""Sends this client's adapters to servers, and remembers which server has which.

An adapter is sent to a server once, also if several sessions and passes need it there at the same
time. Knows no blocks and no routes. Belongs to one event loop.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cachetools import LRUCache

from petals.client.connection.channel_pool import ChannelPool
from petals.errors import UnknownAdapter
from petals.models.adapters.low_rank import Adapter
from petals.types import PeerId
from petals.wire.passes import AdapterKept, AdapterPart, PutAdapter

T = TypeVar("T")

_SERVICE = "blocks"
_REMEMBERED = 4096
"""Most (server, adapter) pairs that are remembered; older ones are sent again."""


class AdapterDelivery:
    """Delivery of adapters for the blocks of ``model``.

    ``connect_seconds(peer)`` limits the opening of a channel, ``request_seconds`` one delivery.
    """

    def __init__(
        self,
        model: str,
        channels: ChannelPool,
        connect_seconds: Callable[[PeerId], float],
        request_seconds: float,
    ) -> None:
        self._model = model
        self._channels = channels
        self._connect_seconds = connect_seconds
        self._request_seconds = request_seconds
        self._locks: defaultdict[PeerId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._there: LRUCache[tuple[PeerId, str], bool] = LRUCache(_REMEMBERED)

    async def _deliver(self, peer: PeerId, adapter: Adapter, *, again: bool = False) -> None:
        """Send the adapter unless ``peer`` has it; ``again``: send it in any case.

        Raises AdapterRefused, PeerError.
        """
        key = (peer, adapter.digest)
        async with self._locks[peer]:
            if self._there.get(key) and not again:
                return
            await self._send(peer, adapter)
            self._there[key] = True

    async def use(
        self, peer: PeerId, adapter: Adapter | None, ask: Callable[[], Awaitable[T]]
    ) -> T:
        """What ``ask`` returns, once ``peer`` has the adapter (None: it needs none). Asks twice if
        the server has dropped the adapter meanwhile. Raises AdapterRefused, PeerError.
        """
        if adapter is None:
            return await ask()
        await self._deliver(peer, adapter)
        try:
            return await ask()
        except UnknownAdapter:
            await self._deliver(peer, adapter, again=True)
            return await ask()

    async def _send(self, peer: PeerId, adapter: Adapter) -> None:
        message = PutAdapter(
            model=self._model,
            adapter=adapter.digest,
            parts=tuple(
                AdapterPart(block, module, part.rank, part.scaling)
                for (block, module), part in adapter.parts.items()
            ),
        )
        tensors = [tensor.detach() for tensor in adapter.tensors]
        async with self._channels.lent(peer, _SERVICE, self._connect_seconds(peer)) as channel:
            await channel.request(
                message, tensors, expect=AdapterKept, timeout=self._request_seconds
            )
