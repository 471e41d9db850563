"""What repair and migration do to a route: reserve other hops, book losses, switch over.

Knows servers and reservations; decides nothing.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from petals.client.routing.bans import Cause
from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.actions import LegStatus
from petals.client.session.hop import HopListener, HopSession
from petals.client.session.reservation import ReplacementHints, release, reserve_route
from petals.client.session.state import SessionState
from petals.client.session.types import SessionSpec
from petals.errors import CacheFull, MissingBlocksError, NoCapacity, PetalsError
from petals.types import BlockSpan, PeerId


class HopReplacer:
    """Changes the hops of one session."""

    def __init__(
        self, state: SessionState, swarm: SwarmState, spec: SessionSpec, listener: HopListener
    ) -> None:
        self._state = state
        self._swarm = swarm
        self._spec = spec
        self._listener = listener

    async def reserve(
        self, blocks: BlockSpan, num_rows: int, hints: ReplacementHints | None
    ) -> list[HopSession]:
        """Hops for ``blocks`` in the present epoch, which join the session. Raises what
        ``reserve_route`` raises.
        """
        spec = replace(self._spec, num_rows=num_rows, epoch=self._state.epoch)
        hops = await reserve_route(self._swarm, blocks, spec, self._listener, hints)
        self._state.joining += hops
        return hops

    async def reserve_reachable(
        self, blocks: BlockSpan, num_rows: int, hints: ReplacementHints
    ) -> list[HopSession]:
        """The same, if possible of servers that the one before them can forward to."""
        if hints.before is not None and self._swarm.config.use_server_to_server:
            now, before = self._swarm.node.clock.monotonic(), hints.before
            peers = {candidate.peer_id for candidate in self._swarm.candidates()}
            is_direct = self._swarm.edges.is_direct
            aside = frozenset(peer for peer in peers if not is_direct(before, peer, now))
            if aside - hints.unfit - {before}:
                fitting = replace(hints, unfit=hints.unfit | aside)
                with suppress(MissingBlocksError, NoCapacity, CacheFull):
                    return await self.reserve(blocks, num_rows, fitting)
        return await self.reserve(blocks, num_rows, hints)

    async def switch(self, start: int, end: int, hops: Sequence[HopSession]) -> None:
        """Let ``hops`` take the place of legs [start, end), and free these."""
        old = self._state.switch(start, end, hops)
        if old:
            self._swarm.node.background.start(release(old), "freeing replaced hops")
        await self._state.announce_epoch()

    def drop(self, hops: Sequence[HopSession]) -> None:
        """Free hops that do not take part after all."""
        self._state.joining = [hop for hop in self._state.joining if hop not in hops]
        if hops:
            self._swarm.node.background.start(release(hops), "freeing unused hops")

    def book(
        self, hop: HopSession, history: History, excluded: dict[PeerId, PetalsError]
    ) -> History:
        """Enter the loss of a hop, once: ban or exclude its server as the failure policy says."""
        error = hop.state.error
        if error is None or hop.state.is_booked:
            return history
        decision = decide(error, history)
        if decision.cause is not None:
            is_slow = hop.state.status is LegStatus.SLOW
            cause = Cause.SLOW if is_slow else decision.cause
            self._swarm.note_failure(hop.peer_id, error, cause)
        if decision.reaction is Reaction.EXCLUDE:
            excluded[hop.peer_id] = error
        hop.book()
        return history.after(error, decision)
