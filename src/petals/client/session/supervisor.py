"""Runs the steps of one session through whatever happens to its servers.

One loop carries out what ``actions.next_action`` decides, until the step has its output or an error
is raised. Knows rows of hidden states and reservations; knows no text and no sampling.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from petals.client.routing.failure_policy import LOOK_AGAIN_SECONDS, History, decide
from petals.client.routing.latency import StepTimeouts, redial_seconds
from petals.client.routing.stragglers import StragglerDetector
from petals.client.routing.swarm_state import SwarmState, show
from petals.client.session.actions import Action, Do, Raise, Redial, Replace, Wait, next_action
from petals.client.session.context import SessionContext
from petals.client.session.fill import FillGoal, FillOutcome, fill
from petals.client.session.hop import HopSession
from petals.client.session.migration import MigrationLoop
from petals.client.session.pipeline import run_pieces
from petals.client.session.replies import Replies
from petals.client.session.reservation import (
    ReplacementHints,
    book,
    drop,
    peer_before,
    release,
    reserve,
    switch,
)
from petals.client.session.state import PendingStep, SessionState
from petals.client.session.types import SessionSpec, StepPiece
from petals.client.trace import EdgeTrace, Repair
from petals.errors import PetalsError
from petals.logs import get_logger
from petals.models.runtime.token_log import RowSlices
from petals.swarm.background import BackgroundTasks
from petals.types import BlockSpan, PeerId

logger = get_logger(__name__)

_KEPT_REPAIRS = 256
"""Number of latest repairs that the trace shows."""

_MIN_KEEPALIVE_SECONDS = 0.05
"""Least pause between two signs of life, however short the leases are."""


class SessionSupervisor:
    """The owner of one session's state. ``close`` it; ``swarm.close`` does so, too."""

    def __init__(self, swarm: SwarmState, blocks: BlockSpan, spec: SessionSpec) -> None:
        self.state = state = SessionState(blocks, swarm.log_budget.open(spec.num_rows))
        self.repairs: deque[Repair] = deque(maxlen=_KEPT_REPAIRS)
        config, replies = swarm.config, Replies(self._on_draining)
        timeouts = StepTimeouts(config.failover, config.step_timeout)
        self._context = SessionContext(state, swarm, spec, replies, timeouts)
        self._config, self._swarm = config, swarm
        self._migration = MigrationLoop(self._context, self.repairs.append)
        self._stragglers = StragglerDetector(config.failover)
        self._tasks = BackgroundTasks()
        self._was_open = False
        self._progress_at = 0.0
        self._warm_spares_at = 0.0
        swarm.sessions.add(self)

    @property
    def edges(self) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        return self._context.edges()

    @property
    def max_length(self) -> int:
        """Tokens per row that every hop has granted."""
        return min(leg.max_length for leg in self.state.legs)

    async def run(self, rows: RowSlices, reorder: tuple[int, ...] | None = None) -> Tensor:
        """The outputs [tokens, H] of a step that reorders the rows, cuts them to ``rows.starts``
        and appends ``rows``. It is repaired as often as it takes; the first one opens the route.

        A step that fails changes nothing. Raises MissingBlocksError, NoCapacity or CacheFull after
        ``repair_timeout``; the last refusal once all servers have refused; PeerError once more than
        ``max_retries`` servers have failed; RouteError if ``max_kept_bytes`` was too little.
        """
        state, config = self.state, self._config.failover
        async with state.lock:
            step = self._begin(rows, reorder)
            try:
                while not (state.legs and step.is_done):
                    now = self._context.now
                    await self._perform(next_action(state.situation(now), config, now), step)
            except BaseException:
                state.has_diverged = state.has_diverged or step.cuts_rows
                await release(state.take_unused())
                raise
            finally:
                state.step = None
            was_dropped = state.confirmed.is_dropped
            state.confirmed.take(step.inputs)
            if state.confirmed.is_dropped and not was_dropped:
                logger.warning("a session is too long to be kept here: it survives fewer failures")
            if config.check_integrity:
                state.check_integrity()
        self._migration.look()
        return torch.cat(step.outputs) if step.outputs else rows.hidden

    async def close(self) -> None:
        """Free what the servers hold; a step under way fails. Idempotent."""
        if self.state.is_closed:
            return
        self.state.is_closed = True
        self._swarm.sessions.discard(self)
        self._migration.end()
        await release([*self.state.legs, *self.state.joining])
        await self._tasks.close()
        self.state.confirmed.drop()

    def _begin(self, rows: RowSlices, reorder: tuple[int, ...] | None) -> PendingStep:
        state, config = self.state, self._config
        step = PendingStep(
            inputs=state.confirmed.branch(rows.starts, reorder),
            rest=rows,
            reorder=reorder,
            cuts_rows=reorder is not None or rows.starts != state.confirmed.lengths,
            server_rows=len(state.confirmed.lengths),
            history=History(
                holds_state=True,
                max_failures=config.num_retries,
                max_wait_seconds=config.repair_timeout if self._was_open else 0.0,
            ),
        )
        self._progress_at = self._context.now
        state.begin(step)
        return step

    async def _perform(self, action: Action | None, step: PendingStep) -> None:
        match action:
            case Do.RUN:
                await self._run_pieces(step)
            case Do.OPEN_ROUTE:
                await self._open_route(step)
            case Do.REBUILD:
                await self._give_up_route(step)
            case Replace(start, end):
                await self._replace(self.state.legs[start:end], step)
            case Redial(legs):
                for leg in (self.state.legs[index] for index in legs):
                    if leg.state.error is not None:
                        decision = decide(leg.state.error, step.history)
                        step.history = step.history.after(leg.state.error, decision)
                await self._redial(legs)
            case Wait(seconds, legs):
                await self._wait(seconds, legs, step)
            case Raise(error):
                if step.history.waiting_since is not None and error is self.state.failure:
                    error.message += f" It has been so since {self._waiting_since(step)}."
                cause = step.last_error if step.last_error is not error else error.__cause__
                raise error from cause

    async def _open_route(self, step: PendingStep) -> None:
        """Reserve hops for all blocks; those of a rebuild are fed with the session's inputs."""
        is_first = not self._was_open
        num_rows = self._context.spec.num_rows if is_first else len(step.inputs.lengths)
        hints = None if is_first else ReplacementHints(excluded=self.state.excluded)
        hops = await self._reserve((), num_rows, hints)
        if not hops:
            return
        await switch(self._context, (), hops)
        if is_first:
            self._was_open = True
            seconds = self._config.repair_timeout
            step.history = replace(step.history, max_wait_seconds=seconds)
            self._tasks.start(self._keep_alive(), "keeping a session alive")
        else:
            await self._feed(step)
        self._warm_spares()

    async def _feed(self, step: PendingStep) -> None:
        """Run the session's inputs through a route that has nothing yet. Not by a replay: hops that
        cannot keep their outputs are fed like this, too.
        """
        step.reorder, step.server_rows, step.pieces = None, len(step.inputs.lengths), []
        whole = step.inputs.whole()
        if whole is not None:
            parts = whole.parts(self._piece_tokens)
            pieces = [StepPiece(next(self.state.ids), part) for part in parts]
            self.state.has_diverged = True  # until all have been run; what comes may be a cancel
            self.state.has_diverged = not await run_pieces(self._context, pieces)

    async def _redial(self, indices: Iterable[int]) -> None:
        """Open new streams to lost legs, all at the same time."""

        async def redial(leg: HopSession) -> None:
            seconds = redial_seconds(leg.trace.overhead_seconds, self._config.failover)
            await leg.redial(self._swarm.node, seconds)
            logger.debug("a stream to …%s broke and was opened anew", leg.peer_id[-6:])
            self.state.losses.pop(leg.hop, None)
            self._swarm.bans.lift(leg.peer_id)
            await self.state.announce_to(leg)

        works = [redial(self.state.legs[index]) for index in indices]
        for result in await asyncio.gather(*works, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, PetalsError):
                raise result

    async def _wait(self, seconds: float, legs: tuple[int, ...], step: PendingStep) -> None:
        """No server was found: pause, call lost hops, look for servers again."""
        state, swarm = self.state, self._swarm
        failure, now = state.failure, self._context.now
        assert failure is not None
        history = replace(step.history, now=now)
        step.history, state.failure = history.after(failure, decide(failure, history)), None
        if seconds and not step.has_warned:
            step.has_warned = True
            text = "waiting up to %g s, since %s: %s"
            since = self._waiting_since(step)
            logger.warning(text, swarm.config.repair_timeout, since, failure.message)
        step.num_repairs = 0  # the time that waiting takes is limited by itself
        await swarm.node.clock.sleep(seconds)
        await self._redial(legs)
        if not legs or any(state.legs[index].state.is_lost for index in legs):
            await swarm.look_again(state.sought, LOOK_AGAIN_SECONDS)

    async def _replace(self, lost: list[HopSession], step: PendingStep) -> None:
        """Put other hops in the place of lost ones, filled from the hop before, or from us."""
        context, state = self._context, self.state
        self._migration.end()
        self._cut(step)
        book(context, lost, state.excluded)
        start = state.legs.index(lost[0])
        donor = state.legs[start - 1] if start else step.inputs
        # The log brings rows as the step reorders them. Empty rows are not brought at all, so the
        # step itself reorders them.
        is_reordered = not start and any(step.inputs.lengths)
        num_rows = len(step.inputs.lengths) if is_reordered else step.server_rows
        hints = ReplacementHints(peer_before(context, lost), state.excluded)
        hops = await self._reserve(lost, num_rows, hints)
        if not hops:
            return
        goal = FillGoal(step.needed_lengths, step.pieces[0].request_id, step.reorder)
        if await fill(context, hops, goal, donor) is FillOutcome.DONE:
            step.history = replace(step.history, waiting_since=None)
            await switch(context, lost, hops)
            return
        book(context, hops, state.excluded)
        drop(context, hops)
        # A hop that is lost is replaced. Without one, a hop cannot hand on what it has put out.
        is_lost = any(hop.state.is_lost for hop in (*state.legs[:start], *hops))
        state.has_diverged = state.has_diverged or not is_lost

    async def _reserve(
        self, old: Sequence[HopSession], num_rows: int, hints: ReplacementHints | None
    ) -> list[HopSession]:
        """Hops in the place of ``old``; none, and the reason in ``state.failure``, if there are
        none.
        """
        state = self.state
        if state.step is not None:
            state.step.num_repairs += 1
        try:
            return await reserve(self._context, old, num_rows, hints)
        except PetalsError as error:
            state.failure = error
            state.sought = (
                BlockSpan(old[0].blocks.start, old[-1].blocks.end) if old else state.blocks
            )
            return []

    async def _give_up_route(self, step: PendingStep) -> None:
        """Free all hops; a new route follows."""
        state = self.state
        self._migration.end()
        book(self._context, state.legs, state.excluded)
        # First out of the state, then freed: a step that is cancelled meanwhile must not leave hops
        # behind that the client itself has closed.
        legs, state.legs, state.has_diverged, step.pieces = state.legs, [], False, []
        await release(legs)

    async def _run_pieces(self, step: PendingStep) -> None:
        self._cut(step)
        self._note_repairs()
        await self.state.announce_epoch()
        await run_pieces(self._context, step.pieces)
        if step.settle():
            step.history, step.num_repairs = step.history.progressed(), 0
            self._progress_at = self._context.now
        if step.is_done:
            self._leave_stragglers()
            if self._context.now >= self._warm_spares_at:
                self._warm_spares()

    def _cut(self, step: PendingStep) -> None:
        if not step.pieces:
            step.cut(self._piece_tokens, self.state.ids)

    @property
    def _piece_tokens(self) -> int:
        """Tokens of a piece that all hops take and can work on at the same time; 0: no limit."""
        limits = [self.state.max_step_tokens]
        if len(self.state.legs) > 1:
            limits.append(self._config.prefill_chunk_tokens)
        return min((limit for limit in limits if limit), default=0)

    def _note_repairs(self) -> None:
        """All hops are there again: record which ones replace those that were lost."""
        seconds = self._context.now - self._progress_at
        for lost, reason in self.state.losses.items():
            peer, blocks = lost.peer_id, lost.blocks
            by = tuple(leg.hop for leg in self.state.legs if leg.blocks.overlaps(blocks))
            self.repairs.append(Repair(peer, blocks, reason, by, seconds))
            text = "blocks %s of …%s (%s) are served again after %.2f s: %s"
            logger.info(text, blocks, peer[-6:], reason, seconds, show(by))
        if self.state.losses:
            self.state.losses.clear()
            self._warm_spares()

    def _waiting_since(self, step: PendingStep) -> str:
        clock = self._swarm.node.clock
        waited = clock.monotonic() - (step.history.waiting_since or clock.monotonic())
        return time.strftime("%H:%M:%S", time.localtime(clock.now() - waited))

    def _leave_stragglers(self) -> None:
        """Give up hops that others would outrun; the next step replaces them like dead ones."""
        swarm, now = self._swarm, self._context.now
        for leg in self.state.legs:
            expected_seconds = (
                partial(swarm.promised_seconds, leg.hop),
                partial(swarm.alternative_seconds, leg.hop, self._context.spec.cache_tokens),
            )
            if self._stragglers.should_leave(leg.blocks, leg.timings, expected_seconds, now):
                leg.leave_as_slow("It is slow: others would take less than half the time.")

    def _warm_spares(self) -> None:
        """Ask possible replacements how they are, so that a repair finds them ready."""
        self._warm_spares_at = self._context.now + self._config.update_period
        route = tuple(leg.hop for leg in self.state.legs)
        work = self._swarm.warm_spares(route, self._context.spec.cache_tokens)
        self._swarm.node.background.start(work, "measuring spares")

    async def _keep_alive(self) -> None:
        """Signs of life to all servers, so that leases go on while the session rests."""
        config = self._config.failover
        while True:
            hops = [*self.state.legs, *self.state.joining]
            lease = min((hop.lease_seconds for hop in hops), default=0.0)
            await asyncio.sleep(max(lease / config.keepalives_per_lease, _MIN_KEEPALIVE_SECONDS))
            for hop in hops:
                # Not one after the other: a server that takes no data must not hold up the rest.
                self._tasks.start(hop.keep(), "sign of life")

    def _on_draining(self, peer: PeerId, seconds: float) -> None:
        """A server has announced that it stops."""
        self._swarm.note_leaving(peer, seconds)
        self._migration.look()
