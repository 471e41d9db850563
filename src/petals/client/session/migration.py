"""A session leaves servers that are about to stop, while these still serve.

Replacements are reserved beside the old hops and get a copy of the rows while steps go on; between
two steps they get what has come since, and take over. A copy is the old hops' keys and values, if a
replacement can go on with them, else states that it computes from. Where that fails the old hops
serve on, it is tried again, and their end is a loss like any other. Decides nothing: ``actions``
does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from petals.client.session.actions import Do, LegStatus, Migrate, Wait, next_action
from petals.client.session.context import SessionContext
from petals.client.session.fill import FillGoal, FillOutcome, fill
from petals.client.session.hop import HopSession
from petals.client.session.reservation import (
    ReplacementHints,
    book,
    drop,
    peer_before,
    reserve,
    switch,
)
from petals.client.session.state import SessionMigration
from petals.client.session.types import ReplicaProgress
from petals.client.trace import Repair
from petals.errors import CacheFull, MissingBlocksError, NoCapacity, PetalsError
from petals.logs import get_logger
from petals.models.runtime.token_log import TokenLog
from petals.types import PeerId

logger = get_logger(__name__)


class MigrationLoop:
    """Carries out what is to be done between steps, in a task of its own while there is any."""

    def __init__(self, context: SessionContext, note: Callable[[Repair], None]) -> None:
        self._context = context
        self._state = context.state
        self._config = context.config.failover
        self._note = note
        self._excluded: dict[PeerId, PetalsError] = {}
        self._no_kv: set[PeerId] = set()
        """Servers whose keys and values did not arrive: theirs are not asked for again."""
        self._pause_seconds = self._config.migration_pause_seconds
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin, if a hop drains and nothing has begun yet."""
        is_busy = self._task is not None and not self._task.done()
        is_needed = any(leg.state.status is LegStatus.DRAINING for leg in self._state.legs)
        if is_needed and not is_busy and not self._state.is_closed:
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
                now = self._context.now
                match next_action(self._state.situation(now), self._config, now):
                    case Migrate(start, end):
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
        legs = self._state.legs
        draining = (leg for leg in legs if leg.state.status is LegStatus.DRAINING)
        hints = ReplacementHints(
            before=peer_before(self._context, old),
            excluded=self._excluded,
            unfit=frozenset(leg.peer_id for leg in draining),
            kv_donors={hop.blocks: hop.peer_id for hop in old if self._may_give_kv(hop)},
        )
        try:
            hops = await self._reserve_reachable(old, hints)
        except PetalsError as error:
            self._excluded.clear()
            self._postpone(error.message)
            return
        have = ReplicaProgress.nothing(self._state.num_rows)
        self._state.migration = SessionMigration(old, hops, have)

    async def _reserve_reachable(
        self, old: list[HopSession], hints: ReplacementHints
    ) -> list[HopSession]:
        """Replacements, if possible such that the server before them can forward to."""
        context, num_rows = self._context, self._state.num_rows
        if hints.before is not None and context.config.use_server_to_server:
            peers = {candidate.peer_id for candidate in context.swarm.candidates()}
            is_direct, before, now = context.swarm.edges.is_direct, hints.before, context.now
            aside = frozenset(peer for peer in peers if not is_direct(before, peer, now))
            if aside - hints.unfit - {before}:
                fitting = replace(hints, unfit=hints.unfit | aside)
                with suppress(MissingBlocksError, NoCapacity, CacheFull):
                    return await reserve(context, old, num_rows, fitting)
        return await reserve(context, old, num_rows, hints)

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
        outcome = FillOutcome.DONOR_LOST
        if self._can_give_kv(migration, goal.num_tokens):
            for donor, hop in zip(old, hops):
                outcome = await fill(context, [hop], goal, donor, kv=True)
                if outcome is not FillOutcome.DONE:
                    self._no_kv.add(donor.peer_id)
                    break
        elif start or not rows.is_dropped:
            donor_of_states = self._state.legs[start - 1] if start else rows
            outcome = await fill(context, hops, goal, donor_of_states)
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
            by = tuple(new.hop for new in migration.hops if new.blocks.overlaps(hop.blocks))
            seconds = self._context.now - began
            self._note(Repair(hop.peer_id, hop.blocks, "The server leaves.", by, seconds))

    def _can_give_kv(self, migration: SessionMigration, num_tokens: int) -> bool:
        """Can the replacements go on with the old hops' keys and values, and get them in time?"""
        old, hops = migration.old, migration.hops
        return len(old) == len(hops) and all(
            self._may_give_kv(donor) and self._suits(donor, hop, num_tokens)
            for donor, hop in zip(old, hops)
        )

    def _may_give_kv(self, hop: HopSession) -> bool:
        return self._context.config.use_server_to_server and hop.peer_id not in self._no_kv

    def _suits(self, old: HopSession, new: HopSession, num_tokens: int) -> bool:
        info, now = old.info, self._context.now
        is_alike = old.blocks == new.blocks and info.kv_format == new.info.kv_format != ""
        is_direct = self._context.swarm.edges.is_direct(old.peer_id, new.peer_id, now)
        num_blocks = max(1, info.blocks[1] - info.blocks[0])
        num_bytes = num_tokens * info.kv_token_bytes * len(old.blocks) / num_blocks
        seconds = num_bytes / self._config.migration_bytes_per_second
        is_quick = seconds <= self._config.migration_kv_share * (old.state.drains_at - now)
        return is_alike and is_direct and is_quick

    def _postpone(self, why: str) -> None:
        """Give the replacements up, and try again after a pause."""
        logger.info("migration has to wait: %s", why)
        self._drop()
        self._state.migrate_at = self._context.now + self._pause_seconds
        longest = self._config.migration_max_pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, longest)

    def _drop(self) -> None:
        migration, self._state.migration = self._state.migration, None
        if migration is not None:
            drop(self._context, migration.hops)
