"""Other hops in the place of a session's hops: of lost ones, and of those that drain or are slow.

Both kinds of replacement reserve hops, fill them with the session's rows, and switch over. A repair
does so while a step waits. A migration does so while steps go on and the old hops still serve: the
replacements get copies of the rows, and between two steps what has come since. A copy is the old
hops' keys and values, if a replacement can go on with them, else states that it computes from.
Where a migration fails the old hops serve on, it is tried again, and their end is a loss like any
other. Decides nothing: ``state.next_action`` does.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from petals.client.routing.bans import Cause
from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.session.fill import FillGoal, FillOutcome, fill
from petals.client.session.hop import HopSession, LegStatus
from petals.client.session.pipeline import SessionContext
from petals.client.session.reservation import release, reserve
from petals.client.session.state import (
    Do,
    Replace,
    ReplicaProgress,
    SessionMigration,
    Wait,
    next_action,
)
from petals.errors import CacheFull, MissingBlocksError, NoCapacity, PeerTimeout, PetalsError
from petals.logs import get_logger
from petals.models.runtime.token_log import TokenLog
from petals.types import PeerId

logger = get_logger(__name__)


async def reserve_for_step(
    context: SessionContext, old: Sequence[HopSession], num_rows: int, *, is_first: bool = False
) -> list[HopSession]:
    """Hops in the place of ``old`` for the step under way; none, and the reason in
    ``state.failure``, if there are none.
    """
    state = context.state
    if state.step is not None:
        state.step.num_repairs += 1
    try:
        return await reserve(context, old, num_rows, None if is_first else state.excluded)
    except PetalsError as error:
        state.failure = error
        return []


async def switch(
    context: SessionContext, old: Sequence[HopSession], hops: Sequence[HopSession]
) -> None:
    """Let ``hops`` take the place of ``old`` legs, and free these."""
    context.state.switch(old, hops)
    if old:
        context.swarm.node.background.start(release(old), "freeing replaced hops")
    await context.state.announce_epoch()


def drop(context: SessionContext, hops: Sequence[HopSession]) -> None:
    """Free hops that do not take part after all."""
    context.state.joining = [hop for hop in context.state.joining if hop not in hops]
    if hops:
        context.swarm.node.background.start(release(hops), "freeing unused hops")


def book(
    context: SessionContext, hops: Iterable[HopSession], excluded: dict[PeerId, PetalsError]
) -> None:
    """Enter the losses among ``hops``, once each: ban servers, or add them to ``excluded``, as the
    failure policy says, and remember what is to be repaired.

    All are decided with the history as it was before: a server of two hops that has forgotten the
    session has forgotten it once, not twice.
    """
    state, step = context.state, context.state.step
    history = History(holds_state=True) if step is None else step.history
    for hop in hops:
        error = hop.state.error
        if error is None or hop.state.is_booked:
            continue
        decision = decide(error, history)
        if decision.cause is not None:
            is_hung = hop.state.status is LegStatus.HUNG
            context.swarm.note_failure(
                hop.peer_id, error, Cause.SLOW if is_hung else decision.cause
            )
        if decision.reaction is Reaction.EXCLUDE:
            excluded[hop.peer_id] = error
        if step is not None:
            step.history, step.last_error = step.history.after(error, decision), error
        if hop in state.legs:
            state.losses[hop.hop] = error.message
        hop.book()


async def repair(context: SessionContext, lost: Sequence[HopSession]) -> bool:
    """Put other hops in the place of lost ones, filled from the hop before, or from the client.

    False: that failed; if it is no fault of a hop that is lost, the session has diverged.
    """
    state, step = context.state, context.state.step
    assert step is not None
    book(context, state.legs, state.excluded)
    start = state.legs.index(lost[0])
    donor = state.legs[start - 1] if start else step.inputs
    # The log brings rows as the step reorders them. Empty rows are not brought at all, so the step
    # itself reorders them.
    is_reordered = not start and any(step.inputs.lengths)
    num_rows = len(step.inputs.lengths) if is_reordered else step.server_rows
    hops = await reserve_for_step(context, lost, num_rows)
    if not hops:
        return False
    goal = FillGoal(step.needed_lengths, step.pieces[0].request_id, step.reorder)
    if await fill(context, hops, goal, donor) is FillOutcome.DONE:
        await switch(context, lost, hops)
        return True
    book(context, hops, state.excluded)
    drop(context, hops)
    # A hop that is lost is replaced. Without one, a hop cannot hand on what it has put out.
    is_lost = any(hop.state.is_lost for hop in (*state.legs[:start], *hops))
    state.has_diverged = state.has_diverged or not is_lost
    return False


class MigrationLoop:
    """Carries out what is to be done between steps, in a task of its own while there is any."""

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._state = context.state
        self._config = context.config.failover
        self._excluded: dict[PeerId, PetalsError] = {}
        self._no_kv: set[PeerId] = set()
        """Servers whose keys and values did not arrive: theirs are not asked for again."""
        self._pause_seconds = self._config.migration_pause_seconds
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begin, unless it has begun. To be called while a hop drains or is slow."""
        if self._task is None or self._task.done():
            background = self._context.swarm.node.background
            self._task = background.start(self._run(), "migrating a session")

    def end(self) -> None:
        """Stop: the route changes. Replacements are freed in the background."""
        if self._task is not None:
            self._task.cancel()
        self._task = None
        self._drop()

    async def _run(self) -> None:
        try:
            while (work := await self._next()) is not None:
                await work
        finally:
            # After ``end``, the replacements there are, if any, belong to another task.
            if self._task is asyncio.current_task():
                self._drop()

    async def _next(self) -> Awaitable[object] | None:
        """What is to be done while steps go on; None: nothing any more."""
        while True:
            async with self._state.lock:
                match next_action(self._state, self._config, self._context.now):
                    case Replace(start, end):
                        return self._reserve(self._state.legs[start:end])
                    case Do.COPY:
                        return self._copy()
                    case Wait(seconds):
                        return self._context.swarm.node.clock.sleep(seconds)
                    case Do.SWITCH:
                        await self._switch()
                    case _:
                        return None

    async def _reserve(self, old: list[HopSession]) -> None:
        """Reserve replacements, if possible such that the server before them can forward to."""
        context, state = self._context, self._state
        leaving = {leg.peer_id for leg in state.legs if leg.state.migrates}
        aside: set[PeerId] = set()
        start = state.legs.index(old[0])
        if start and context.config.use_server_to_server:
            near = state.legs[start - 1].peer_id
            peers = {candidate.peer_id for candidate in context.swarm.candidates()}
            aside = {far for far in peers - {near} if not context.is_direct(near, far)}
        donors = [hop for hop in old if self._may_give_kv(hop)]
        attempt = partial(reserve, context, old, state.num_rows, self._excluded, kv_donors=donors)
        hops: list[HopSession] = []
        try:
            if aside - leaving:
                with suppress(MissingBlocksError, NoCapacity, CacheFull):
                    hops = await attempt(unfit=frozenset(leaving | aside | {near}))
            hops = hops or await attempt(unfit=frozenset(leaving))
        except PetalsError as error:
            self._excluded.clear()
            self._postpone(error.message)
            return
        state.migration = SessionMigration(old, hops, ReplicaProgress.nothing(state.num_rows))

    def _copy(self) -> Awaitable[object]:
        """Work that brings the replacements to where the rows are now."""
        migration, confirmed = self._state.migration, self._state.confirmed
        assert migration is not None
        have, migration.have = migration.have, ReplicaProgress.all_of(confirmed.lengths)
        migration.num_copies += 1
        return self._send(migration, have, confirmed.branch())

    async def _send(
        self, migration: SessionMigration, have: ReplicaProgress, rows: TokenLog
    ) -> bool:
        """Send the replacements what they lack of ``rows``; False if that failed."""
        context, old, hops = self._context, migration.old, migration.hops
        goal = FillGoal(rows.lengths, next(self._state.ids), have=have)
        start = self._state.legs.index(old[0])
        outcome, pairs = FillOutcome.DONOR_LOST, list(zip(old, hops))
        if len(old) == len(hops) and all(self._suits(*pair, goal.num_tokens) for pair in pairs):
            for donor, hop in pairs:
                outcome = await fill(context, [hop], goal, donor, kv=True)
                if outcome is not FillOutcome.DONE:
                    self._no_kv.add(donor.peer_id)
                    break
        elif start or not rows.is_dropped:
            outcome = await fill(
                context, hops, goal, self._state.legs[start - 1] if start else rows
            )
        if outcome is FillOutcome.DONE:
            return True
        migration.have = ReplicaProgress.nothing(self._state.num_rows)
        if any(hop.state.is_lost for hop in hops):
            book(context, hops, self._excluded)
            self._postpone(outcome.value)
        return False

    async def _switch(self) -> None:
        """Send what is still missing; then the replacements take the old hops' place."""
        migration, began = self._state.migration, self._context.now
        assert migration is not None
        if not await self._send(migration, migration.have, self._state.confirmed):
            if self._state.migration is not None:
                self._postpone("the rows could not be copied")
            return
        self._state.migration = None
        self._pause_seconds = self._config.migration_pause_seconds
        await switch(self._context, migration.old, migration.hops)
        for hop in migration.old:
            self._state.note_repair(hop.hop, self._reason(hop), self._context.now - began)

    def _reason(self, hop: HopSession) -> str:
        """Why a hop was replaced. A slow server is avoided from now on."""
        if hop.state.status is not LegStatus.SLOW:
            return "The server leaves."
        reason = "It is slow: others would take less than half the time."
        self._context.swarm.note_failure(
            hop.peer_id, PeerTimeout(reason, peer_id=hop.peer_id), Cause.SLOW
        )
        return reason

    def _may_give_kv(self, hop: HopSession) -> bool:
        return self._context.config.use_server_to_server and hop.peer_id not in self._no_kv

    def _suits(self, old: HopSession, new: HopSession, num_tokens: int) -> bool:
        """Can the replacement go on with the old hop's keys and values, and get them in time?"""
        info, seconds_left = old.info, old.state.drains_at - self._context.now
        is_alike = old.blocks == new.blocks and info.kv_format == new.info.kv_format != ""
        num_blocks = max(1, info.blocks[1] - info.blocks[0])
        num_bytes = num_tokens * info.kv_token_bytes * len(old.blocks) / num_blocks
        seconds = num_bytes / self._config.migration_bytes_per_second
        is_quick = seconds <= self._config.migration_kv_share * seconds_left
        is_direct = self._context.is_direct(old.peer_id, new.peer_id)
        return is_alike and is_direct and is_quick and self._may_give_kv(old)

    def _postpone(self, why: str) -> None:
        """Give the replacements up. Slow hops are kept; for others it is tried after a pause."""
        logger.info("migration has to wait: %s", why)
        self._drop()
        for leg in self._state.legs:
            leg.keep_though_slow()
        self._state.migrate_at = self._context.now + self._pause_seconds
        longest = self._config.migration_max_pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, longest)

    def _drop(self) -> None:
        migration, self._state.migration = self._state.migration, None
        if migration is not None:
            drop(self._context, migration.hops)
