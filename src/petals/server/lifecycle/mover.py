"""When a running server moves to other blocks.

The loop around the pure decision of ``rebalancing``: it reads views, waits, announces DRAINING, and
asks the other holders of the blocks for their state before the server leaves them. Knows no
sessions and no models beyond their names.
"""

import asyncio
from dataclasses import replace
from types import MappingProxyType

from petals.clock import Clock
from petals.errors import PetalsError
from petals.logs import get_logger
from petals.server.config import MovingConfig
from petals.server.lifecycle import rebalancing
from petals.server.lifecycle.placement import coverage_of
from petals.server.lifecycle.served_span import ServedSpan
from petals.swarm.directory.records import View
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, PeerId, ServerState
from petals.wire.replies import Info
from petals.wire.requests import GetInfo
from petals.wire.services import BLOCKS_SERVICE

logger = get_logger(__name__)

_ASK_SECONDS = 3.0
"""Time limit (s) for a server's answer; one that does not answer counts as dead."""

_MAX_ASKED = 64
"""Most servers that are asked before a move; others count as dead."""


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

        By then DRAINING was announced for ``propagation_seconds`` (at most ``look_seconds``; not at
        all if some block has no server), and every block of the server is held by another server
        that has just said that it is ONLINE.
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
                state = replace(state, next_look=now + min(policy.look_seconds, policy.gap_seconds))
                continue
            state, blocks = rebalancing.should_move(view, me, now, state, policy)
            has_gap = not coverage_of(view).served.all()
            if blocks is not None and await self._confirm_move(served, blocks, has_gap=has_gap):
                return blocks

    async def _confirm_move(self, served: ServedSpan, blocks: BlockSpan, *, has_gap: bool) -> bool:
        """Announce DRAINING and look again; ONLINE again if a block would have no other server.

        Two holders of a block may decide to leave it at the same time, each relying on the other.
        Each is DRAINING before it asks the other, so at least one of them learns that the other is
        DRAINING, and stays. The wait lets the others see where this server goes before they decide
        themselves; a gap is filled without it.
        """
        logger.info("blocks %s need this server more than %s", blocks, served.blocks)
        await served.announce_state(ServerState.DRAINING, blocks)
        if not has_gap:
            longest = self._config.policy.look_seconds
            await self._clock.sleep(min(self._config.propagation_seconds, longest))
        view = await self._view()
        if rebalancing.may_leave(await self._of_those_who_stay(view, served.blocks), self._me):
            return True
        logger.info("staying at blocks %s: no other server holds all of them", served.blocks)
        await served.announce_state(ServerState.ONLINE)
        return False

    @property
    def _me(self) -> PeerId:
        return self._node.peer_id

    async def _view(self) -> View:
        return await self._node.directory.view(self._model, self._num_blocks, whole=True)

    async def _of_those_who_stay(self, view: View, blocks: BlockSpan) -> View:
        """``view`` without the other holders of ``blocks`` that have not just said that they are
        ONLINE at the blocks of their record.
        """
        holders = {
            peer: record
            for peer, record in view.records.items()
            if peer != self._me and any(span.overlaps(blocks) for span in record.block_spans)
        }
        asked = list(holders)[:_MAX_ASKED]
        answers = await asyncio.gather(*map(self._info_of, asked))
        staying = {
            peer
            for peer, info in zip(asked, answers)
            if info is not None
            and info.state == ServerState.ONLINE
            and info.blocks in holders[peer].spans
        }
        kept = {p: r for p, r in view.records.items() if p not in holders or p in staying}
        return replace(view, records=MappingProxyType(kept))

    async def _info_of(self, peer: PeerId) -> Info | None:
        try:
            async with await self._node.open_channel(peer, BLOCKS_SERVICE, _ASK_SECONDS) as channel:
                info, _ = await channel.request(GetInfo(), expect=Info, timeout=_ASK_SECONDS)
        except PetalsError:
            return None
        return info
