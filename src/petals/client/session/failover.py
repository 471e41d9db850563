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
from petals.client.routing.stragglers import StragglerDetector
from petals.client.routing.swarm_state import SwarmState, show
from petals.client.session.hop import HopSession
from petals.client.session.input_log import ReplayBuffer, RowSlices
from petals.client.session.latency import LatencyEstimate
from petals.client.session.migration import SessionMigration
from petals.client.session.pending import Refilling
from petals.client.session.pipeline import EdgeLost, HopPipeline
from petals.client.session.reservation import ReplacementHints, release, reserve_route
from petals.client.session.state import PendingStep, SessionState, in_pieces, refill_from_us
from petals.client.session.types import ReplicaProgress, SessionSpec, StepCall, StepPiece
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


class Failover:
    """The path of one session; ``run`` steps through it. Await its methods one at a time."""

    def __init__(self, swarm: SwarmState, blocks: BlockSpan, terms: SessionSpec) -> None:
        self.repairs: deque[Repair] = deque(maxlen=_KEPT_REPAIRS)
        self._swarm = swarm
        self._blocks = blocks
        self._course = SessionState(swarm, terms)
        self._handover = SessionMigration(self._course, self.repairs.append)
        self._pace = LatencyEstimate()
        self._losses: dict[Hop, str] = {}
        """Hops that are gone and not replaced yet, and why."""
        self._slow = StragglerDetector()
        self._meet_again_at = 0.0
        self._closed = False

    @property
    def path(self) -> HopPipeline | None:
        """The hops of now; None between a path that was given up and the next."""
        return self._course.path

    async def open(self) -> HopPipeline:
        """Reserve the first path. Raises what ``reserve_route`` raises."""
        path = self._take(await reserve_route(self._swarm, self._blocks, self._course.terms))
        self._warm_spares(path)
        return path

    def _take(self, hops: Sequence[HopSession]) -> HopPipeline:
        self._course.path = path = HopPipeline(hops, self._swarm, self._pace, self._handover.look)
        return path

    async def close(self) -> None:
        """Free what the servers hold. Idempotent."""
        self._closed = True
        await self._handover.close()
        if self.path is not None:
            await self.path.close()

    async def run(self, attempt: PendingStep) -> Tensor:
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
                course.servers_diverged = course.servers_diverged or attempt.cuts_rows
                raise
            course.told = attempt.inputs
        self._handover.look()
        return output

    async def _run(self, attempt: PendingStep) -> Tensor:
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

    def _weigh(self, error: PetalsError, attempt: PendingStep) -> None:
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
            self._course.servers_diverged = True

    async def _made_whole(self, attempt: PendingStep, progress_at: float) -> HopPipeline:
        """A path on which the attempt can go on."""
        path = self.path
        if path is not None and not attempt.pieces:
            attempt.pieces = self._cut(path, attempt.rest, attempt.reorder)
        if path is not None and not self._course.servers_diverged:
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
                cause = Cause.SLOW if hop.is_straggler else Cause.FAILED
                self._swarm.note_failure(hop.peer_id, hop.failure, cause)
        if path is None or self._course.servers_diverged:
            path = await self._rebuilt(attempt)
        else:
            await self._mend(path, attempt)
        self._note_repairs(path, self._now() - progress_at)
        self._warm_spares(path)
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

    async def _mend(self, path: HopPipeline, attempt: PendingStep) -> None:
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
                num_rows=attempt.server_rows if start else len(attempt.inputs.lengths),
            )
            try:
                hops = await self._open_patiently(blocks, terms, ReplacementHints(before), attempt)
            except _PathIsBack:
                await path.begin_epoch(self._course.epoch)
                continue
            path.exchange(start, end, hops)
            await path.begin_epoch(self._course.epoch)
            await self._refill(path, start, start + len(hops), attempt)

    async def _refill(self, path: HopPipeline, start: int, end: int, attempt: PendingStep) -> None:
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
        self, path: HopPipeline, start: int, arc: Sequence[HopSession], attempt: PendingStep
    ) -> None:
        """Refill hops that hand on to each other: from the hop before them, if need be through us,
        or with the session's own inputs.
        """
        step, lengths = attempt.pieces[0].call, attempt.needed_lengths
        source = path.hops[start - 1] if start else None
        rows, reordered = attempt.inputs, step.reorder is not None
        if source is not None:
            is_direct = path.arc_end(start - 1) > start
            largest = max(sum(lengths), sum(lengths[row] for row in step.reorder or ()))
            fetched = ReplayBuffer(largest, path.hidden_size, self._course.terms.dtype)
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
        held = ReplicaProgress.nothing(len(rows.lengths))
        await refill_from_us(path, refilling, parts, held=held, reordered=reordered)

    async def _rebuilt(self, attempt: PendingStep) -> HopPipeline:
        """A new path, fed with the session's inputs as the attempt finds them."""
        self._course.servers_diverged = True
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
        path = self._take(
            await self._open_patiently(self._blocks, terms, ReplacementHints(), attempt)
        )
        if replay is not None:
            await path.run(self._cut(path, replay, None))
        attempt.reorder, attempt.server_rows = None, len(attempt.inputs.lengths)
        attempt.pieces = self._cut(path, attempt.rest, None)
        self._course.servers_diverged = False
        return path

    async def _open_patiently(
        self, blocks: BlockSpan, terms: SessionSpec, repair: ReplacementHints, attempt: PendingStep
    ) -> list[HopSession]:
        hops = await self._patiently(
            lambda: reserve_route(self._swarm, blocks, terms, repair), blocks, attempt.last_failure
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

    def _cut(
        self, path: HopPipeline, part: RowSlices, reorder: tuple[int, ...] | None
    ) -> list[StepPiece]:
        pieces = []
        for piece in in_pieces(part, self._course.piece_tokens(path.hops)):
            call = StepCall(next(self._course.step_ids), piece.starts, piece.counts, reorder)
            pieces.append(StepPiece(call, piece.hidden))
            reorder = None
        return pieces

    def _note_repairs(self, path: HopPipeline, seconds: float) -> None:
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

    def _leave_the_slow(self, path: HopPipeline) -> None:
        """Give up a hop that others would outrun; the next step replaces it like a dead one."""
        now, swarm = self._now(), self._swarm
        if now >= self._meet_again_at:
            self._warm_spares(path)
        for hop in path.hops:
            expected_seconds = (
                partial(swarm.promised_seconds, hop.hop),
                partial(swarm.alternative_seconds, hop.hop, self._course.terms.cache_tokens),
            )
            if self._slow.should_leave(hop.blocks, hop.timings, expected_seconds, now):
                hop.is_straggler = True
                hop.fail(PeerTimeout("It is slow: others would take less than half the time."))

    def _warm_spares(self, path: HopPipeline) -> None:
        self._meet_again_at = self._now() + self._swarm.config.update_period
        work = self._swarm.warm_spares(path.route, self._course.terms.cache_tokens)
        self._swarm.node.background.start(work, "meeting spares")

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()
