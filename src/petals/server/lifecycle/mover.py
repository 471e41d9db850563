"""When a running server moves to other blocks.

The loop around the pure decision of ``rebalancing``: it reads views, waits, announces DRAINING, and
pings the other holders of the blocks before the server leaves them. Knows no sessions and no models
beyond their names.
"""

import asyncio
from dataclasses import replace
from types import MappingProxyType

from petals.clock import Clock
from petals.errors import PetalsError
from petals.logs import get_logger
from petals.server.config import MovingConfig
from petals.server.lifecycle import rebalancing
from petals.server.lifecycle.served_span import ServedSpan
from petals.swarm.directory.records import View
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, PeerId, ServerState

logger = get_logger(__name__)

_PING_SECONDS = 3.0
"""Timeout of a ping; a server that does not answer counts as dead."""

_MAX_PINGED = 64
"""Most servers that are pinged before a move; others count as dead."""


class Mover:
    """Decides for the server whose node is ``node``."""

    def __init__(
        self, node: SwarmNode, model: str, num_blocks: int, config: MovingConfig, clock: Clock
    ) -> None:
        self._node = node
        self._model = model
        self._num_blocks = num_blocks
        self._config = config
        self._clock = clock

    async def next_blocks(self, served: ServedSpan) -> BlockSpan:
        """Return when the server should leave ``served``, with the blocks to move to.

        By then DRAINING was announced for ``propagation_seconds``, and every block of the server
        is held by another server that has answered a ping.
        """
        me, policy = self._node.peer_id, self._config.policy
        view = await self._view()
        now = self._clock.monotonic()
        state = rebalancing.begin(me, now, len(view.records), policy)
        while True:
            await self._clock.sleep(state.next_look - self._clock.monotonic())
            view, now = await self._view(), self._clock.monotonic()
            if me not in view.records:
                # The directory has lost our record for the moment; the decision is based on it.
                state = replace(state, next_look=now + policy.look_seconds)
                continue
            state, blocks = rebalancing.should_move(view, me, now, state, policy)
            if blocks is not None and await self._confirm_move(served, blocks):
                return blocks

    async def _confirm_move(self, served: ServedSpan, blocks: BlockSpan) -> bool:
        """Announce DRAINING and look again; ONLINE again if a block would have no other server.

        Two holders of a block may decide to leave it at the same time, each relying on the other.
        After ``propagation_seconds`` both see that the other is DRAINING, and both stay.
        """
        logger.info("blocks %s need this server more than %s", blocks, served.blocks)
        await served.announce_state(ServerState.DRAINING, blocks)
        await self._clock.sleep(self._config.propagation_seconds)
        view = await self._view()
        if rebalancing.may_leave(await self._without_the_dead(view, served.blocks), self._me):
            return True
        logger.info("staying at blocks %s: no other server holds all of them", served.blocks)
        await served.announce_state(ServerState.ONLINE)
        return False

    @property
    def _me(self) -> PeerId:
        return self._node.peer_id

    async def _view(self) -> View:
        return await self._node.directory.view(self._model, self._num_blocks, whole=True)

    async def _without_the_dead(self, view: View, blocks: BlockSpan) -> View:
        """``view`` without the other holders of ``blocks`` that did not answer a ping."""
        holders = [
            peer
            for peer, record in view.records.items()
            if peer != self._me and any(span.overlaps(blocks) for span in record.block_spans)
        ]
        pinged = holders[:_MAX_PINGED]
        answers = await asyncio.gather(*map(self._answers, pinged))
        alive = {peer for peer, answer in zip(pinged, answers) if answer}
        kept = {p: r for p, r in view.records.items() if p not in holders or p in alive}
        return replace(view, records=MappingProxyType(kept))

    async def _answers(self, peer: PeerId) -> bool:
        try:
            await self._node.ping(peer, _PING_SECONDS)
        except PetalsError:
            return False
        return True
