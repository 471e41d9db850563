"""A session leaves servers that are about to go, while these still serve.

Successors are opened beside the old hops and get a copy of the rows while steps go on; between two
steps they get what has come since and take the old hops' place. A copy is what the old hops keep,
if a successor can go on with that, and else states that it computes from. Where that fails the old
hops serve on, it is tried again, and their end is a death like any other: `recovery` mends it.
Knows rows and reservations; knows no text and no sampling.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from petals.client.session.hop import HopSession
from petals.client.session.input_log import ReplayBuffer, RowSlices
from petals.client.session.pending import Refilling
from petals.client.session.pipeline import HopPipeline
from petals.client.session.reservation import ReplacementHints, release, reserve_route
from petals.client.session.state import SessionState, in_pieces, refill_from_us
from petals.client.session.types import ReplicaProgress, SessionSpec
from petals.client.trace import Repair
from petals.errors import (
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    OutboxLost,
    PetalsError,
    SessionGap,
)
from petals.logs import get_logger
from petals.types import BlockSpan, PeerId

logger = get_logger(__name__)

_LITTLE_TOKENS = 2
"""Tokens of a row that a successor can get between two steps without anybody noticing."""
_MAX_COPIES = 8
"""A successor that never catches up gets the rest between two steps all the same."""
_ASSUMED_BYTES_PER_SECOND = 12.5e6
"""Of the way between two servers: 100 Mbit/s."""
_PAGES_SHARE = 0.25
"""Pages may take so much of the time that the old server stays; states are fewer bytes."""
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 8.0


@dataclass(slots=True, eq=False)
class _Replacement:
    """``hops`` are to take the place of those that are ``leaving``, behind ``before``."""

    path: HopPipeline
    epoch: int
    before: HopSession | None
    leaving: Sequence[HopSession]
    hops: Sequence[HopSession]


class SessionMigration:
    """Hands one session over, whenever hops of it say that they leave. ``close`` it."""

    def __init__(self, course: SessionState, note: Callable[[Repair], None]) -> None:
        self._course = course
        self._note = note
        self._held: ReplicaProgress | None = None
        """What the successors have or will have of the rows as they are now."""
        self._unable: set[PeerId] = set()
        """Servers whose pages did not get through: theirs are not asked for again."""
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop; what successors have reserved is freed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def look(self) -> None:
        """Begin, if a hop of the path leaves and nothing has begun yet."""
        path = self._course.path
        is_busy = self._task is not None and not self._task.done()
        if path is not None and path.leaving and not is_busy:
            background = self._course.swarm.node.background
            self._task = background.start(self._run(), "handing a session over")

    def follow(self, reorder: tuple[int, ...] | None, starts: Sequence[int]) -> None:
        """A step begins, which first brings the rows to this."""
        if self._held is not None:
            self._held = self._held.after(reorder, starts)

    async def _run(self) -> None:
        pause, clock = _FIRST_PAUSE_SECONDS, self._course.swarm.node.clock
        while (path := self._course.path) is not None and path.leaving:
            try:
                await self._hand_over()
                pause = _FIRST_PAUSE_SECONDS
            except PetalsError as error:
                logger.info("handing over has to wait: %s", error.message)
                await clock.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def _hand_over(self) -> None:
        course = self._course
        # Not within a repair: what that opens, perhaps for the same blocks, would be of our epoch,
        # and a server takes two requests of one epoch for the same one.
        async with course.turn:
            path, epoch = course.path, course.epoch
            leaving = [] if path is None else path.leaving
            num_rows = len(course.told.lengths) or course.terms.num_rows
        if path is None or not leaving:
            return
        start = path.hops.index(leaving[0])
        before = path.hops[start - 1] if start else None
        blocks = BlockSpan(leaving[0].blocks.start, leaving[-1].blocks.end)
        terms = replace(course.terms, epoch=epoch, num_rows=num_rows)
        hops = await self._open(path, before, blocks, terms)
        succession = _Replacement(path, epoch, before, leaving, hops)
        try:
            path.listen_to(hops)
            await self._copy(succession)
        except BaseException:
            for hop in hops:
                if hop.failure is not None:
                    course.swarm.note_failure(hop.peer_id, hop.failure)
            await release(hops)
            raise
        finally:
            self._held = None

    async def _open(
        self, path: HopPipeline, before: HopSession | None, blocks: BlockSpan, terms: SessionSpec
    ) -> list[HopSession]:
        """Successors, best of all such that the hop ``before`` can hand on to."""
        swarm = self._course.swarm
        leaving = frozenset(hop.peer_id for hop in path.hops if hop.leaving_seconds is not None)
        kv_donors = {hop.blocks: hop.peer_id for hop in path.leaving if self._may_give(hop)}
        repair = ReplacementHints(None, leaving, kv_donors)
        if before is None:
            return await reserve_route(swarm, blocks, terms, repair)
        repair = replace(repair, before=before.peer_id)
        now, peers = swarm.node.clock.monotonic(), {c.peer_id for c in swarm.candidates()}
        aside = {p for p in peers if not swarm.edges.is_direct(before.peer_id, p, now)}
        if aside - leaving:
            with contextlib.suppress(MissingBlocksError, NoCapacity, CacheFull):
                fitting = replace(repair, unfit=leaving | aside)
                return await reserve_route(swarm, blocks, terms, fitting)
        return await reserve_route(swarm, blocks, terms, repair)

    async def _copy(self, succession: _Replacement) -> None:
        """Copy what is missing, then what has come meanwhile, until it is little; then change."""
        course, clock = self._course, self._course.swarm.node.clock
        for num_left in reversed(range(_MAX_COPIES)):
            async with course.turn:
                began, lengths = clock.monotonic(), course.told.lengths
                self._check(succession)
                held = self._held or ReplicaProgress.nothing(len(lengths))
                is_little = max(held.missing(lengths), default=0) <= _LITTLE_TOKENS
                copy = self._send(succession, held)
                if is_little or not num_left:
                    await copy
                    await self._change(succession)
                    self._tell(succession, clock.monotonic() - began)
                    return
                self._held = ReplicaProgress.all_of(lengths)
            await copy

    def _check(self, succession: _Replacement) -> None:
        """Raises OutboxLost if a repair came between."""
        course = self._course
        is_same = succession.path is course.path and succession.epoch == course.epoch
        is_whole = not any(hop.failure for hop in (*succession.path.hops, *succession.hops))
        if not is_same or not is_whole or course.servers_diverged:
            raise OutboxLost("A repair comes first.")

    def _send(self, succession: _Replacement, held: ReplicaProgress) -> Coroutine[Any, Any, None]:
        """Work that brings the successors from what they have to where the rows stand now."""
        told = self._course.told
        num_tokens = sum(held.missing(told.lengths))
        if num_tokens and self._can_give_pages(succession, num_tokens):
            return self._give_pages(succession, held, told.lengths)
        if succession.before is None or not num_tokens:
            return self._fill(succession, held, told.lengths, told.since(held.lengths), None)
        return self._fill(succession, held, told.lengths, None, succession.before)

    def _can_give_pages(self, succession: _Replacement, num_tokens: int) -> bool:
        """Can successors go on with what the old hops keep, and get it in good time?"""
        leaving, hops = succession.leaving, succession.hops
        return len(leaving) == len(hops) and all(
            self._can_give(old, new, num_tokens) for old, new in zip(leaving, hops)
        )

    def _can_give(self, old: HopSession, new: HopSession, num_tokens: int) -> bool:
        swarm, info = self._course.swarm, old.info
        is_alike = old.blocks == new.blocks and info.kv_format == new.info.kv_format != ""
        now = swarm.node.clock.monotonic()
        is_direct = swarm.edges.is_direct(old.peer_id, new.peer_id, now)
        num_blocks = max(1, info.blocks[1] - info.blocks[0])
        num_bytes = num_tokens * info.page_bytes * len(old.blocks) / num_blocks
        seconds = num_bytes / _ASSUMED_BYTES_PER_SECOND
        is_quick = seconds <= _PAGES_SHARE * (old.leaving_seconds or 0.0)
        return is_alike and is_direct and is_quick and self._may_give(old)

    def _may_give(self, hop: HopSession) -> bool:
        return self._course.swarm.config.use_server_to_server and hop.peer_id not in self._unable

    async def _give_pages(
        self, succession: _Replacement, held: ReplicaProgress, lengths: tuple[int, ...]
    ) -> None:
        """Let every old hop give its successor what it keeps. Raises OutboxLost or SessionGap if
        one cannot; next time the successors compute it.
        """
        for old, new in zip(succession.leaving, succession.hops):
            try:
                refilling = self._refilling(old, [new], held, lengths)
                await self._replay(succession.path, refilling, held, lengths, pages=True)
            except (OutboxLost, SessionGap):
                self._unable.add(old.peer_id)
                raise

    async def _fill(
        self,
        succession: _Replacement,
        held: ReplicaProgress,
        lengths: tuple[int, ...],
        ours: RowSlices | None,
        source: HopSession | None,
    ) -> None:
        """Bring the successors, arc by arc, from ``held`` to ``lengths``: the first of them with
        ``ours`` unless there is a ``source``.
        """
        path, rest = succession.path, list(succession.hops)
        while rest:
            if source is not None and path.arc_end(0, [source, *rest]) > 1:
                arc = rest[: path.arc_end(0, [source, *rest]) - 1]
                refilling = self._refilling(source, arc, held, lengths)
                await self._replay(path, refilling, held, lengths)
            else:
                if source is not None:
                    ours = await self._fetch(path, source, held, lengths)
                arc = rest[: path.arc_end(0, rest)]
                parts = in_pieces(ours, self._course.piece_tokens(arc))
                refilling = self._refilling(None, arc, held, lengths)
                await refill_from_us(path, refilling, parts, held=held)
            source, rest = arc[-1], rest[len(arc) :]

    async def _fetch(
        self, path: HopPipeline, source: HopSession, held: ReplicaProgress, lengths: tuple[int, ...]
    ) -> RowSlices | None:
        """The rows that ``source`` cannot hand on, on their way through us."""
        num_tokens, dtype = sum(held.missing(lengths)), self._course.terms.dtype
        fetched = ReplayBuffer(num_tokens, path.hidden_size, dtype, held.lengths)
        refilling = replace(self._refilling(source, (), held, lengths), fetched=fetched)
        await self._replay(path, refilling, held, lengths)
        return fetched.part()

    async def _replay(
        self,
        path: HopPipeline,
        refilling: Refilling,
        held: ReplicaProgress,
        lengths: tuple[int, ...],
        *,
        pages: bool = False,
    ) -> None:
        source = refilling.source
        assert source is not None
        step_id, hops = refilling.step_id, refilling.next_hops
        ask = partial(source.replay, step_id, lengths, hops, held=held, pages=pages)
        await path.refill(refilling, ask)

    def _refilling(
        self,
        source: HopSession | None,
        hops: Sequence[HopSession],
        held: ReplicaProgress,
        lengths: tuple[int, ...],
    ) -> Refilling:
        num_tokens = sum(held.missing(lengths))
        return Refilling(next(self._course.step_ids), source, hops, num_tokens)

    async def _change(self, succession: _Replacement) -> None:
        """The successors take the old hops' place."""
        course, path = self._course, succession.path
        start = path.hops.index(succession.leaving[0])
        path.exchange(start, start + len(succession.leaving), succession.hops)
        course.epoch += 1
        await path.begin_epoch(course.epoch)

    def _tell(self, succession: _Replacement, seconds: float) -> None:
        for old in succession.leaving:
            by = tuple(hop.hop for hop in succession.hops if hop.blocks.overlaps(old.blocks))
            self._note(Repair(old.peer_id, old.blocks, "The server leaves.", by, seconds))
