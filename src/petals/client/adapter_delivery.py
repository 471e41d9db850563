"""Which servers have been given which of this client's adapters.

An adapter is sent to a server once, however many passes want it there at the same time. Knows no
blocks and no routes. Lives in one event loop.
"""

import asyncio
from collections import OrderedDict, defaultdict

from petals.models.adapters import Adapter
from petals.swarm.channel import Channel
from petals.types import PeerId
from petals.wire.passes import AdapterKept, AdapterPart, PutAdapter

_REMEMBERED = 4096


class AdapterDelivery:
    """Sends adapters for the blocks of ``model``, and remembers where they are."""

    def __init__(self, model: str, timeout_seconds: float) -> None:
        self._model = model
        self._timeout_seconds = timeout_seconds
        self._turns: defaultdict[PeerId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._there: OrderedDict[tuple[PeerId, str], None] = OrderedDict()

    async def deliver(self, channel: Channel, adapter: Adapter, *, again: bool = False) -> None:
        """See that the peer of ``channel`` has the adapter; ``again``: it says that it has not.

        Nothing may be under way on the channel. Raises AdapterRefused, PeerError.
        """
        key = (channel.peer_id, adapter.digest)
        async with self._turns[channel.peer_id]:
            if key in self._there and not again:
                self._there.move_to_end(key)
                return
            message = PutAdapter(
                model=self._model,
                adapter=adapter.digest,
                parts=tuple(
                    AdapterPart(block, module, part.rank, part.scaling)
                    for (block, module), part in adapter.parts.items()
                ),
            )
            tensors = [tensor.detach() for tensor in adapter.tensors]
            await channel.request(
                message, tensors, expect=AdapterKept, timeout=self._timeout_seconds
            )
            self._there[key] = None
            if len(self._there) > _REMEMBERED:
                self._there.popitem(last=False)
