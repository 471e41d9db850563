"""A session's path through faults: what is lost is replaced, refilled, and the step repeated.

A step is an attempt that ends with its outputs, a client's fault, or nobody left to serve. Whoever
failed is avoided; what servers have forgotten or confused is *rebuilt*: a new path, fed with the
session's own inputs. Knows rows of hidden states and reservations; knows no text and no sampling.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from petals.client.routing.bans import Cause
from petals.client.routing.stragglers import SlowHops
from petals.client.routing.swarm_state import SwarmView, show
from petals.client.session.attempt import Attempt
from petals.client.session.fetched import Fetched
from petals.client.session.hop import HopSession
from petals.client.session.input_log import Part
from petals.client.session.latency import Pace
from petals.client.session.migration import HandOver
from petals.client.session.pending import Refilling
from petals.client.session.pipeline import EdgeLost, SessionPath
from petals.client.session.reservation import Repairing, open_hops, release
from petals.client.session.state import Course, in_pieces, refill_from_us
from petals.client.session.types import Held, Piece, StepCall, Terms
from petals.client.trace import Repair
from petals.errors import (
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    OutboxLost,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    SessionClosed,
    SessionError,
)
from petals.logs import get_logger
from petals.types import SESSION_ID_BYTES, BlockSpan, Hop, PeerId, SessionId

logger = get_logger(__name__)
T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 0.5
_KEPT_REPAIRS = 256


class _PathIsBack(Exception):
    """Servers that were out of reach answer again: there is less to replace."""


class Recovery:
    """The path of one session; ``run`` steps through it. Await its methods one at a time."""

    def __init__(self, swarm: SwarmView, blocks: BlockSpan, terms: Terms) -> None:
        self.repairs: deque[Repair] = deque(maxlen=_KEPT_REPAIRS)
        self._swarm = swarm
        self._blocks = blocks
        self._course = Course(swarm, terms)
        self._handover = HandOver(self._course, self.repairs.append)
        self._pace = Pace()
        self._losses: dict[Hop, str] = {}
        """Hops that are gone and not replaced yet, and why."""
        self._slow = SlowHops()
        self._meet_again_at = 0.0
        self._closed = False

    @property
    def path(self) -> SessionPath | None:
        """The hops of now; None between a path that was given up and the next."""
        return self._course.path

    async def open(self) -> SessionPath:
        """Reserve the first path. Raises what ``open_hops`` raises."""
        path = self._take(await open_hops(self._swarm, self._blocks, self._course.terms))
        self._meet_spares(path)
        return path

    def _take(self, hops: Sequence[HopSession]) -> SessionPath:
        self._course.path = path = SessionPath(hops, self._swarm, self._pace, self._handover.look)
        return path

    async def close(self) -> None:
        """Free what the servers hold. Idempotent."""
        self._closed = True
        await self._handover.close()
        if self.path is not None:
            await self.path.close()

    async def run(self, attempt: Attempt) -> Tensor:
        """The outputs of a step [tokens, H], repaired as often as it takes.

        Raises RequestError, CacheFull, MissingBlocksError or NoCapacity after ``repair_timeout``,
        and a PeerError or SessionError once servers have refused more than ``max_retries`` times.
        """
        course = self._course
        async with course.turn:
            self._handover.follow(attempt.reorder, attempt.rest.starts)
            try:
                output = await self._run(attempt)
            except BaseException:
                course.is_stale = course.is_stale or attempt.cuts_rows
                raise
            course.told = attempt.inputs
        self._handover.look()
        return output

    async def _run(self, attempt: Attempt) -> Tensor:
        progress_at = self._now()
        while True:
            try:
                path = await self._made_whole(attempt, progress_at)
                progress_at = self._now()
                await path.run(attempt.pieces)
                attempt.settle()
                self._leave_the_slow(path)
                return torch.cat(attempt.outputs)
            except (PeerError, SessionError) as error:
                attempt.settle()
                self._weigh(error, attempt)

    def _weigh(self, error: PetalsError, attempt: Attempt) -> None:
        """What a failure means for the path. Raises it if trying again makes no sense."""
        attempt.last_failure = error
        if self._closed or isinstance(error, CacheFull):
            raise error
        has_forgotten = isinstance(error, SessionClosed) and error.peer_id not in attempt.forgetful
        if has_forgotten:
            attempt.forgetful.add(PeerId(error.peer_id))
        elif not isinstance(error, PeerUnreachable | PeerTimeout | OutboxLost):
            attempt.num_refusals += 1
            if attempt.num_refusals > self._swarm.config.num_retries:
                raise error
        if self.path is not None and not self.path.lost:
            self._course.is_stale = True

    async def _made_whole(self, attempt: Attempt, progress_at: float) -> SessionPath:
        """A path on which the attempt can go on."""
        path = self.path
        if path is not None and not attempt.pieces:
            attempt.pieces = self._cut(path, attempt.rest, attempt.reorder)
        if path is not None and not self._course.is_stale:
            # A stream may break although both ends live: each peer is called once.
            broken = [hop for hop in path.lost if isinstance(hop.failure, PeerUnreachable)]
            await self._reconnect([h for h in broken if h.peer_id not in attempt.reconnected])
            attempt.reconnected.update(hop.peer_id for hop in broken)
            if not path.lost:
                return path
        for hop in () if path is None else path.lost:
            assert hop.failure is not None
            if hop.hop not in self._losses:
                self._losses[hop.hop] = hop.failure.message
                cause = Cause.SLOW if hop.was_slow else Cause.FAILED
                self._swarm.note_failure(hop.peer_id, hop.failure, cause)
        if path is None or self._course.is_stale:
            path = await self._rebuilt(attempt)
        else:
            await self._mend(path, attempt)
        self._note_repairs(path, self._now() - progress_at)
        self._meet_spares(path)
        return path

    async def _reconnect(self, hops: Sequence[HopSession]) -> bool:
        """Call peers whose streams broke. True if one of them is there."""
        works = [hop.reconnect(self._swarm.node) for hop in hops]
        for result in await asyncio.gather(*works, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, PetalsError):
                raise result
        back = [hop for hop in hops if hop.failure is None]
        for hop in back:
            logger.debug("a stream to …%s broke and was opened anew", hop.peer_id[-6:])
            self._losses.pop(hop.hop, None)
            self._swarm.bans.lift(hop.peer_id)
        return bool(back)

    def _out_of_reach(self) -> list[HopSession]:
        """Lost hops that may hold their rows still: perhaps it was only the way to them."""
        lost = [] if self.path is None else self.path.lost
        return [hop for hop in lost if isinstance(hop.failure, PeerUnreachable | PeerTimeout)]

    async def _mend(self, path: SessionPath, attempt: Attempt) -> None:
        """Replace the hops that are lost, from left to right, each refilled from before it."""
        while path.lost:
            start = path.hops.index(path.lost[0])
            end = start + 1
            while end < len(path.hops) and path.hops[end].failure is not None:
                end += 1
            blocks = BlockSpan(path.hops[start].blocks.start, path.hops[end - 1].blocks.end)
            before = path.hops[start - 1].peer_id if start else None
            self._course.epoch += 1
            terms = replace(
                self._course.terms,
                epoch=self._course.epoch,
                num_rows=attempt.num_rows_told if start else len(attempt.inputs.lengths),
            )
            try:
                hops = await self._open_patiently(blocks, terms, Repairing(before), attempt)
            except _PathIsBack:
                await path.begin_epoch(self._course.epoch)
                continue
            path.exchange(start, end, hops)
            await path.begin_epoch(self._course.epoch)
            await self._refill(path, start, start + len(hops), attempt)

    async def _refill(self, path: SessionPath, start: int, end: int, attempt: Attempt) -> None:
        """Give new hops the rows as the attempt finds them. Raises OutboxLost if nobody can."""
        if path.max_step_tokens and attempt.pieces[0].call.num_tokens > path.max_step_tokens:
            raise OutboxLost("The pieces of this step are too long for its new servers.")
        if not any(attempt.inputs.lengths):
            return
        while start < end:
            arc = path.hops[start : min(path.arc_end(start), end)]
            try:
                await self._refill_arc(path, start, arc, attempt)
            except EdgeLost:
                continue  # it is closed now: the next try goes around it
            start += len(arc)

    async def _refill_arc(
        self, path: SessionPath, start: int, arc: Sequence[HopSession], attempt: Attempt
    ) -> None:
        """Refill hops that hand on to each other: from the hop before them, if need be through us,
        or with the session's own inputs.
        """
        step, lengths = attempt.pieces[0].call, attempt.told_lengths
        source = path.hops[start - 1] if start else None
        rows, reordered = attempt.inputs, step.reorder is not None
        if source is not None:
            is_direct = path.arc_end(start - 1) > start
            largest = max(sum(lengths), sum(lengths[row] for row in step.reorder or ()))
            fetched = Fetched(largest, path.hidden_size, self._course.terms.dtype)
            refilling = Refilling(
                step_id=step.step_id,
                source=source,
                hops=arc if is_direct else (),
                num_tokens=largest,
                fetched=None if is_direct else fetched,
            )
            to = refilling.next_hops
            ask = partial(source.replay, step.step_id, lengths, to, reorder=step.reorder)
            await path.refill(refilling, ask)
            if is_direct:
                return
            rows, reordered = fetched.rows, fetched.reordered
        parts = in_pieces(rows.whole(), self._course.piece_tokens(path.hops))
        refilling = Refilling(step.step_id, None, arc, sum(rows.lengths))
        held = Held.nothing(len(rows.lengths))
        await refill_from_us(path, refilling, parts, held=held, reordered=reordered)

    async def _rebuilt(self, attempt: Attempt) -> SessionPath:
        """A new path, fed with the session's inputs as the attempt finds them."""
        self._course.is_stale = True
        replay = attempt.inputs.whole()
        if self.path is not None:
            await self.path.close()
            self._course.path = None
        self._course.epoch = 0
        self._course.terms = replace(
            self._course.terms,
            session_id=SessionId(secrets.token_bytes(SESSION_ID_BYTES)),
            num_rows=len(attempt.inputs.lengths),
        )
        terms = self._course.terms
        path = self._take(await self._open_patiently(self._blocks, terms, Repairing(), attempt))
        if replay is not None:
            await path.run(self._cut(path, replay, None))
        attempt.reorder, attempt.num_rows_told = None, len(attempt.inputs.lengths)
        attempt.pieces = self._cut(path, attempt.rest, None)
        self._course.is_stale = False
        return path

    async def _open_patiently(
        self, blocks: BlockSpan, terms: Terms, repair: Repairing, attempt: Attempt
    ) -> list[HopSession]:
        hops = await self._patiently(
            lambda: open_hops(self._swarm, blocks, terms, repair), blocks, attempt.last_failure
        )
        if self._closed:
            await release(hops)
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        return hops

    async def _patiently(
        self, work: Callable[[], Awaitable[T]], blocks: BlockSpan, cause: PetalsError | None
    ) -> T:
        """Try until it works, for ``repair_timeout`` while nobody can serve ``blocks``."""
        clock, seconds = self._swarm.node.clock, self._swarm.config.repair_timeout
        failures: list[float] = []
        since = ""
        while True:
            try:
                return await work()
            except (MissingBlocksError, NoCapacity, CacheFull) as error:
                failures.append(clock.monotonic())
                since = since or time.strftime("%H:%M:%S", time.localtime(clock.now()))
                left = failures[0] + seconds - failures[-1]
                if left <= 0 or self._closed:
                    error.message += f" It has been so since {since}."
                    raise error from cause
                if len(failures) == 2:
                    logger.warning(
                        "waiting up to %g s, since %s: %s", seconds, since, error.message
                    )
                if len(failures) > 1:
                    await clock.sleep(min(_LOOK_AGAIN_SECONDS, left))
                # Nobody else serves these blocks: only now are those called that are avoided.
                if await self._reconnect(self._out_of_reach()):
                    raise _PathIsBack from None
                await self._swarm.look_again(blocks, _LOOK_AGAIN_SECONDS)

    def _cut(self, path: SessionPath, part: Part, reorder: tuple[int, ...] | None) -> list[Piece]:
        pieces = []
        for piece in in_pieces(part, self._course.piece_tokens(path.hops)):
            call = StepCall(next(self._course.step_ids), piece.starts, piece.counts, reorder)
            pieces.append(Piece(call, piece.hidden))
            reorder = None
        return pieces

    def _note_repairs(self, path: SessionPath, seconds: float) -> None:
        for lost, reason in self._losses.items():
            peer, blocks = lost.peer_id, lost.blocks
            by = tuple(hop for hop in path.route if hop.blocks.overlaps(blocks))
            self.repairs.append(Repair(peer, blocks, reason, by, seconds))
            logger.info(
                "blocks %s of …%s (%s) are served again after %.2f s: %s",
                blocks,
                peer[-6:],
                reason,
                seconds,
                show(by),
            )
        self._losses.clear()

    def _leave_the_slow(self, path: SessionPath) -> None:
        """Give up a hop that others would outrun; the next step replaces it like a dead one."""
        now, swarm = self._now(), self._swarm
        if now >= self._meet_again_at:
            self._meet_spares(path)
        for hop in path.hops:
            promises = (
                partial(swarm.promised_seconds, hop.hop),
                partial(swarm.alternative_seconds, hop.hop, self._course.terms.cache_tokens),
            )
            if self._slow.should_leave(hop.blocks, hop.timings, promises, now):
                hop.was_slow = True
                hop.fail(PeerTimeout("It is slow: others would take less than half the time."))

    def _meet_spares(self, path: SessionPath) -> None:
        self._meet_again_at = self._now() + self._swarm.config.update_period
        work = self._swarm.meet_spares(path.route, self._course.terms.cache_tokens)
        self._swarm.node.background.start(work, "meeting spares")

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()
