"""A session's path through faults: what is lost is replaced, refilled, and the step repeated.

A step is an attempt that ends with its outputs, a client's fault, or nobody left to serve. Whoever
failed is avoided; what servers have forgotten or confused is *rebuilt*: a new path, fed with the
session's own inputs. Knows rows of hidden states and reservations; knows no text and no sampling.
"""

import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from petals.client.hop import StepCall, Terms
from petals.client.kept_inputs import KeptInputs, Part, cut
from petals.client.opening import open_hops
from petals.client.path import Piece, SessionPath
from petals.client.swarm_view import SwarmView, show
from petals.client.trace import Repair
from petals.errors import (
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    SessionClosed,
    SessionError,
)
from petals.logs import get_logger
from petals.types import SESSION_ID_BYTES, BlockSpan, Hop, SessionId

logger = get_logger(__name__)
T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 0.5
_KEPT_REPAIRS = 256


@dataclass(slots=True)
class Attempt:
    """One step of the session, cut into pieces for the path that is to run it.

    inputs: the rows as the step finds them; pieces that are done are added to it. ``rest`` is what
    remains, ``reorder`` what servers must do to their rows first.
    """

    inputs: KeptInputs
    rest: Part
    reorder: tuple[int, ...] | None
    cuts_rows: bool
    """It reorders rows or rolls some back: if it fails, the servers' rows are not ours any more."""
    pieces: list[Piece] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    num_refusals: int = 0
    last_failure: PetalsError | None = None

    def settle(self) -> None:
        """Take the pieces that are done, from the first on, out of what remains."""
        while self.pieces and self.pieces[0].output is not None:
            piece = self.pieces.pop(0)
            assert piece.output is not None
            self.outputs.append(piece.output)
            self.inputs.append(piece.call.counts, piece.hidden)
            self.reorder = None
            starts = self.inputs.lengths
            counts = tuple(
                start + number - now
                for start, number, now in zip(self.rest.starts, self.rest.counts, starts)
            )
            self.rest = Part(starts, counts, self.rest.hidden[piece.call.num_tokens :])


@dataclass(frozen=True, slots=True)
class _Loss:
    """A hop that is gone and not replaced yet."""

    hop: Hop
    reason: str


class Recovery:
    """The path of one session; ``run`` steps through it. Await its methods one at a time."""

    def __init__(self, swarm: SwarmView, blocks: BlockSpan, terms: Terms) -> None:
        self.path: SessionPath | None = None
        self.repairs: deque[Repair] = deque(maxlen=_KEPT_REPAIRS)
        self._swarm = swarm
        self._blocks = blocks
        self._terms = terms
        self._step_ids = count(1)
        self._losses: list[_Loss] = []
        self._is_stale = False
        self._closed = False

    async def open(self) -> SessionPath:
        """Reserve the first path. Raises what ``open_hops`` raises."""
        hops = await open_hops(self._swarm, self._blocks, self._terms)
        self.path = SessionPath(hops, self._swarm)
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
                if not attempt.pieces:
                    attempt.pieces = self._cut(path, attempt.rest, attempt.reorder)
                await path.run(attempt.pieces)
                attempt.settle()
                return torch.cat(attempt.outputs)
            except (PeerError, SessionError) as error:
                attempt.settle()
                self._weigh(error, attempt)

    def _weigh(self, error: PetalsError, attempt: Attempt) -> None:
        """What a failure means for the path. Raises it if trying again makes no sense."""
        attempt.last_failure = error
        if self._closed or isinstance(error, CacheFull):
            raise error
        if not isinstance(error, PeerUnreachable | PeerTimeout):
            attempt.num_refusals += 1
            if attempt.num_refusals > self._swarm.config.num_retries:
                raise error
        if self.path is not None and not self.path.lost:
            self._is_stale = True

    async def _made_whole(self, attempt: Attempt, progress_at: float) -> SessionPath:
        """A path on which the attempt can go on."""
        path = self.path
        if path is not None and not path.lost and not self._is_stale:
            return path
        for hop in () if path is None else path.lost:
            assert hop.failure is not None
            self._swarm.note_failure(hop.peer_id, hop.failure)
            self._losses.append(_Loss(hop.hop, hop.failure.message))
        path = await self._rebuilt(attempt)
        self._note_repairs(path, self._now() - progress_at)
        return path

    async def _rebuilt(self, attempt: Attempt) -> SessionPath:
        """A new path, fed with the session's inputs as the attempt finds them."""
        self._is_stale = True
        if self.path is not None:
            await self.path.close()
            self.path = None
        terms = replace(
            self._terms,
            session_id=SessionId(secrets.token_bytes(SESSION_ID_BYTES)),
            num_rows=len(attempt.inputs.lengths),
        )
        hops = await self._patiently(
            lambda: open_hops(self._swarm, self._blocks, terms, is_repair=True),
            attempt.last_failure,
        )
        self.path = path = SessionPath(hops, self._swarm)
        if self._closed:
            await path.close()
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        replay = attempt.inputs.whole()
        if replay is not None:
            await path.run(self._cut(path, replay, None))
        attempt.reorder, attempt.pieces = None, []
        self._is_stale = False
        return path

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
        for loss in self._losses:
            peer, blocks = loss.hop.peer_id, loss.hop.blocks
            by = tuple(hop for hop in path.route if hop.blocks.overlaps(blocks))
            self.repairs.append(Repair(peer, blocks, loss.reason, by, seconds))
            logger.info(
                "blocks %s of …%s (%s) are served again after %.2f s: %s",
                blocks,
                peer[-6:],
                loss.reason,
                seconds,
                show(by),
            )
        self._losses.clear()

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()
