"""When a running server goes to other blocks: asks `rebalancing` now and then, and makes sure.

The thin loop around a pure decision: it reads views, waits, pings, and says DRAINING before the
last look. Knows no sessions and no models beyond their names.
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
_MAX_PINGED = 64


class Mover:
    """Decides for one server, whose directory entry is that of ``node``."""

    def __init__(
        self, node: SwarmNode, model: str, num_blocks: int, config: MovingConfig, clock: Clock
    ) -> None:
        self._node = node
        self._model = model
        self._num_blocks = num_blocks
        self._config = config
        self._clock = clock

    async def next_blocks(self, stay: ServedSpan) -> BlockSpan:
        """Returns when it is time to leave ``stay`` for the blocks returned.

        DRAINING has been said then, and heard; whatever speaks against it has been asked for.
        """
        me, policy = self._node.peer_id, self._config.policy
        view = await self._view()
        now = self._clock.monotonic()
        standing = rebalancing.begin(me, now, len(view.records), policy)
        while True:
            await self._clock.sleep(standing.next_look - self._clock.monotonic())
            view, now = await self._view(), self._clock.monotonic()
            if me not in view.records:
                # Nobody has our record just now; without it there is nothing to decide.
                standing = replace(standing, next_look=now + policy.look_seconds)
                continue
            standing, blocks = rebalancing.should_move(view, me, now, standing, policy)
            if blocks is not None and await self._confirm_move(stay, blocks):
                return blocks

    async def _confirm_move(self, stay: ServedSpan, blocks: BlockSpan) -> bool:
        """Say DRAINING and leave time to be heard; ONLINE again if blocks would be left alone."""
        logger.info("blocks %s need this server more than %s", blocks, stay.blocks)
        await stay.say(ServerState.DRAINING, blocks)
        await self._clock.sleep(self._config.propagation_seconds)
        view = await self._view()
        if rebalancing.may_leave(await self._without_the_dead(view, stay.blocks), self._me):
            return True
        logger.info("staying at blocks %s: nobody else holds them now", stay.blocks)
        await stay.say(ServerState.ONLINE)
        return False

    @property
    def _me(self) -> PeerId:
        return self._node.peer_id

    async def _view(self) -> View:
        return await self._node.directory.view(self._model, self._num_blocks, whole=True)

    async def _without_the_dead(self, view: View, blocks: BlockSpan) -> View:
        """The view without those of our blocks' holders that do not answer, or were not asked."""
        holders = [
            peer
            for peer, record in view.records.items()
            if peer != self._me and any(span.overlaps(blocks) for span in record.block_spans)
        ]
        asked = holders[:_MAX_PINGED]
        answers = await asyncio.gather(*map(self._answers, asked))
        alive = {peer for peer, answer in zip(asked, answers) if answer}
        kept = {p: r for p, r in view.records.items() if p not in holders or p in alive}
        return replace(view, records=MappingProxyType(kept))

    async def _answers(self, peer: PeerId) -> bool:
        try:
            await self._node.ping(peer, _PING_SECONDS)
        except PetalsError:
            return False
        return True
