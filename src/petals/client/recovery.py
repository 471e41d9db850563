"""A session's path through faults: what is lost is replaced, refilled, and the step repeated.

A step is an attempt that ends with its outputs, a client's fault, or nobody left to serve. Whoever
failed is avoided; what servers have forgotten or confused is *rebuilt*: a new path, fed with the
session's own inputs. Knows rows of hidden states and reservations; knows no text and no sampling.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from petals.client.attempt import Attempt
from petals.client.hop import HopSession
from petals.client.kept_inputs import Part, cut
from petals.client.opening import Repairing, open_hops, release
from petals.client.pace import Pace
from petals.client.path import SessionPath
from petals.client.slow import SlowHops
from petals.client.swarm_view import SwarmView, show
from petals.client.terms import Piece, Refill, StepCall, Terms
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
from petals.types import SESSION_ID_BYTES, BlockSpan, Hop, Route, SessionId

logger = get_logger(__name__)
T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 0.5
_KEPT_REPAIRS = 256
_SENT_AHEAD = 8
"""Parts of a replay that a server may have waiting."""


class _PathIsBack(Exception):
    """Servers that were out of reach answer again: there is less to replace."""


class Recovery:
    """The path of one session; ``run`` steps through it. Await its methods one at a time."""

    def __init__(self, swarm: SwarmView, blocks: BlockSpan, terms: Terms) -> None:
        self.path: SessionPath | None = None
        self.repairs: deque[Repair] = deque(maxlen=_KEPT_REPAIRS)
        self._swarm = swarm
        self._blocks = blocks
        self._terms = terms
        self._step_ids = count(1)
        self._pace = Pace()
        self._losses: dict[Hop, str] = {}
        """Hops that are gone and not replaced yet, and why."""
        self._slow = SlowHops()
        self._meet_again_at = 0.0
        self._epoch = 0
        self._is_stale = False
        self._closed = False

    async def open(self) -> SessionPath:
        """Reserve the first path. Raises what ``open_hops`` raises."""
        hops = await open_hops(self._swarm, self._blocks, self._terms)
        self.path = SessionPath(hops, self._swarm, self._pace)
        self._meet_spares(self.path)
        return self.path

    async def close(self) -> None:
        """Free what the servers hold. Idempotent."""
        self._closed = True
        if self.path is not None:
            await self.path.close()

    async def run(self, attempt: Attempt) -> Tensor:
        """The outputs of a step [tokens, H], repaired as often as it takes.

        Raises RequestError, CacheFull, MissingBlocksError or NoCapacity after ``repair_timeout``,
        and a PeerError or SessionError once servers have refused more than ``max_retries`` times.
        """
        try:
            return await self._run(attempt)
        except BaseException:
            self._is_stale = self._is_stale or attempt.cuts_rows
            raise

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
        if not isinstance(error, PeerUnreachable | PeerTimeout | OutboxLost):
            attempt.num_refusals += 1
            if attempt.num_refusals > self._swarm.config.num_retries:
                raise error
        if self.path is not None and not self.path.lost:
            self._is_stale = True

    async def _made_whole(self, attempt: Attempt, progress_at: float) -> SessionPath:
        """A path on which the attempt can go on."""
        path = self.path
        if path is not None and not attempt.pieces:
            attempt.pieces = self._cut(path, attempt.rest, attempt.reorder)
        if path is not None and not self._is_stale:
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
                self._swarm.note_failure(hop.peer_id, hop.failure)
        if path is None or self._is_stale or not self._can_mend(path):
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
            self._losses.pop(hop.hop, None)
            self._swarm.bans.lift(hop.peer_id)
        return bool(back)

    def _silent_hops(self) -> list[HopSession]:
        """All hops, if all fell silent: perhaps it is our own network that is away."""
        hops = [] if self.path is None else self.path.hops
        return hops if all(isinstance(hop.failure, PeerTimeout) for hop in hops) else []

    def _can_mend(self, path: SessionPath) -> bool:
        """True if what is lost can be refilled from before it: by us, or by a server."""
        is_at_start = path.lost == path.hops[:1] or path.lost == path.hops
        return self._swarm.config.use_server_to_server or is_at_start

    async def _mend(self, path: SessionPath, attempt: Attempt) -> None:
        """Replace the hops that are lost, from left to right, each refilled from before it."""
        while path.lost:
            start = path.hops.index(path.lost[0])
            end = start + 1
            while end < len(path.hops) and path.hops[end].failure is not None:
                end += 1
            blocks = BlockSpan(path.hops[start].blocks.start, path.hops[end - 1].blocks.end)
            before = path.hops[start - 1].peer_id if start else None
            self._epoch += 1
            terms = replace(
                self._terms,
                epoch=self._epoch,
                num_rows=attempt.num_rows_told if start else len(attempt.inputs.lengths),
            )
            try:
                hops = await self._open_patiently(blocks, terms, Repairing(before), attempt)
            except _PathIsBack:
                continue
            path.exchange(start, end, hops)
            await path.begin_epoch(self._epoch)
            await self._refill(path, start, start + len(hops), attempt)

    async def _refill(self, path: SessionPath, start: int, end: int, attempt: Attempt) -> None:
        """Give new hops the rows as the attempt finds them. Raises OutboxLost if nobody can."""
        if path.max_step_tokens and attempt.pieces[0].call.num_tokens > path.max_step_tokens:
            raise OutboxLost("The pieces of this step are too long for its new servers.")
        if not any(attempt.inputs.lengths):
            return
        first = max(0, start - 1)
        if path.arc_end(first) < end:
            raise OutboxLost("The servers cannot hand states to each other.")
        call, hops = attempt.pieces[0].call, path.route[first + 1 : end]
        if start:
            lengths = attempt.told_lengths
            await path.refill(
                call.step_id, first, end - 1, lambda: path.hops[first].replay(call, lengths, hops)
            )
        else:
            await self._refill_first(path, attempt, hops)

    async def _refill_first(self, path: SessionPath, attempt: Attempt, rest: Route) -> None:
        """The first hop, and the ``rest`` of the new ones, get the session's own inputs."""
        step = attempt.pieces[0].call
        whole = attempt.inputs.whole()
        parts = [] if whole is None else list(cut(whole, self._limit(path)))

        async def send(some: Sequence[Part]) -> None:
            for part in some:
                refill = Refill.LAST if part is some[-1] else Refill.YES
                call = replace(step, starts=part.starts, counts=part.counts, reorder=None)
                call = replace(call, refill=refill, reordered=step.reorder is not None)
                await path.hops[0].send(call, part.hidden, rest)

        for at in range(0, len(parts), _SENT_AHEAD):
            some = parts[at : at + _SENT_AHEAD]
            await path.refill(step.step_id, 0, len(rest), partial(send, some))

    async def _rebuilt(self, attempt: Attempt) -> SessionPath:
        """A new path, fed with the session's inputs as the attempt finds them."""
        self._is_stale = True
        if self.path is not None:
            await self.path.close()
            self.path = None
        self._epoch = 0
        self._terms = replace(
            self._terms,
            session_id=SessionId(secrets.token_bytes(SESSION_ID_BYTES)),
            num_rows=len(attempt.inputs.lengths),
        )
        hops = await self._open_patiently(self._blocks, self._terms, Repairing(), attempt)
        self.path = path = SessionPath(hops, self._swarm, self._pace)
        replay = attempt.inputs.whole()
        if replay is not None:
            await path.run(self._cut(path, replay, None))
        attempt.reorder, attempt.num_rows_told = None, len(attempt.inputs.lengths)
        attempt.pieces = self._cut(path, attempt.rest, None)
        self._is_stale = False
        return path

    async def _open_patiently(
        self, blocks: BlockSpan, terms: Terms, repair: Repairing, attempt: Attempt
    ) -> list[HopSession]:
        hops = await self._patiently(
            lambda: open_hops(self._swarm, blocks, terms, repair), attempt.last_failure
        )
        if self._closed:
            await release(hops)
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        return hops

    async def _patiently(self, work: Callable[[], Awaitable[T]], cause: PetalsError | None) -> T:
        """Try until it works, for ``repair_timeout`` while nobody can serve."""
        clock, seconds = self._swarm.node.clock, self._swarm.config.repair_timeout
        deadline: float | None = None
        while True:
            try:
                return await work()
            except (MissingBlocksError, NoCapacity, CacheFull) as error:
                now = clock.monotonic()
                if deadline is None:
                    deadline = now + seconds
                    since = time.strftime("%H:%M:%S", time.localtime(clock.now()))
                    logger.warning(
                        "waiting up to %g s, since %s: %s", seconds, since, error.message
                    )
                if now >= deadline or self._closed:
                    raise error from cause
                await clock.sleep(min(_LOOK_AGAIN_SECONDS, deadline - now))
                hops = self._silent_hops()
                if hops and await self._reconnect(hops):
                    raise _PathIsBack from None
                with contextlib.suppress(PetalsError):
                    await self._swarm.refresh()

    def _cut(self, path: SessionPath, part: Part, reorder: tuple[int, ...] | None) -> list[Piece]:
        pieces = []
        for piece in cut(part, self._limit(path)):
            call = StepCall(next(self._step_ids), piece.starts, piece.counts, reorder)
            pieces.append(Piece(call, piece.hidden))
            reorder = None
        return pieces

    def _limit(self, path: SessionPath) -> int:
        """Tokens of a piece: what servers take, and less where hops can share the work."""
        limits = [path.max_step_tokens]
        if len(path.hops) > 1:
            limits.append(self._swarm.config.prefill_chunk_tokens)
        return min((limit for limit in limits if limit), default=0)

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
                partial(swarm.alternative_seconds, hop.hop),
            )
            if self._slow.should_leave(hop.blocks, hop.timings, promises, now):
                hop.fail(PeerTimeout("It is slow: others would take less than half the time."))

    def _meet_spares(self, path: SessionPath) -> None:
        self._meet_again_at = self._now() + self._swarm.config.update_period
        self._swarm.node.background.start(self._swarm.meet_spares(path.route), "meeting spares")

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()
