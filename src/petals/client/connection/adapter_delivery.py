"""Which servers have been given which of this client's adapters.

An adapter is sent to a server once, however many passes want it there at the same time. Knows no
blocks and no routes. Lives in one event loop.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from cachetools import LRUCache

from petals.client.connection.channel_pool import ChannelPool
from petals.models.adapters.low_rank import Adapter
from petals.types import PeerId
from petals.wire.passes import AdapterKept, AdapterPart, PutAdapter

_SERVICE = "blocks"
_REMEMBERED = 4096


class AdapterDelivery:
    """Sends adapters for the blocks of ``model``, and remembers where they are."""

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
        self._turns: defaultdict[PeerId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._there: LRUCache[tuple[PeerId, str], bool] = LRUCache(_REMEMBERED)

    async def deliver(self, peer: PeerId, adapter: Adapter, *, again: bool = False) -> None:
        """See that ``peer`` has the adapter; ``again``: it says that it has not.

        Raises AdapterRefused, PeerError.
        """
        key = (peer, adapter.digest)
        async with self._turns[peer]:
            if self._there.get(key) and not again:
                return
            await self._send(peer, adapter)
            self._there[key] = True

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
