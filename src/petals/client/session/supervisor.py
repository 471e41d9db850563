"""Runs the steps of one session through whatever happens to its servers.

One loop carries out what ``state.next_action`` decides, until the step has its output or an error
is raised. Knows rows of hidden states and reservations; knows no text and no sampling.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from petals.client.routing.failure_policy import History, decide
from petals.client.routing.latency import StepTimeouts, is_straggler
from petals.client.routing.swarm_state import SwarmState, show
from petals.client.session.hop import HopSession
from petals.client.session.pipeline import SessionContext, run_pieces
from petals.client.session.replacement import (
    MigrationLoop,
    book,
    repair,
    reserve_for_step,
    switch,
)
from petals.client.session.reservation import release, reserve_forks
from petals.client.session.state import (
    Action,
    Do,
    PendingStep,
    Raise,
    Redial,
    Replace,
    SessionState,
    StepPiece,
    Wait,
    next_action,
)
from petals.client.session.types import SessionSpec
from petals.client.trace import EdgeTrace
from petals.errors import PetalsError
from petals.logs import get_logger
from petals.models.runtime.token_log import RowSlices
from petals.swarm.background import BackgroundTasks
from petals.types import BlockSpan, PeerId
from petals.wire.fields import MAX_ROPE_RUNS

logger = get_logger(__name__)


class SessionSupervisor:
    """The owner of one session's state. ``close`` it; ``swarm.close`` does so, too."""

    def __init__(self, swarm: SwarmState, blocks: BlockSpan, spec: SessionSpec) -> None:
        config = swarm.config
        self.state = SessionState(blocks, swarm.log_budget.open(spec.num_rows))
        timeouts = StepTimeouts(config.failover, config.step_timeout)
        self._context = SessionContext(self.state, swarm, spec, timeouts, self._on_draining)
        self._config, self._swarm = config, swarm
        self._migration = MigrationLoop(self._context)
        self._tasks = BackgroundTasks()
        self._fresh = History(holds_state=True, max_failures=config.num_retries)
        """The history of a step that begins. The first step, which opens the session, waits for no
        server.
        """
        self._was_open = False
        self._progress_at = 0.0
        self._warm_spares_at = 0.0
        self._compare_at = 0.0
        self._rest_until: dict[BlockSpan, float] = {}
        """Blocks whose hop was to be replaced as a straggler -> time (s) from which on it may be
        again.
        """
        swarm.sessions.add(self)

    @property
    def edges(self) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        return self._context.edges()

    @property
    def max_length(self) -> int:
        """Tokens per row that every hop has granted."""
        return min(leg.opened.max_length for leg in self.state.legs)

    async def run(self, rows: RowSlices, reorder: tuple[int, ...] | None = None) -> Tensor:
        """The outputs [tokens, H] of a step that reorders the rows, cuts them to ``rows.starts``
        and appends ``rows``. It is repaired as often as it takes; the first one opens the route.

        A step that fails changes nothing. Raises MissingBlocksError, NoCapacity or CacheFull after
        ``repair_timeout``; the last refusal once all servers have refused; PeerError once more than
        ``max_retries`` servers have failed; RouteError if ``max_kept_bytes`` was too little.
        """
        state, config = self.state, self._config.failover
        async with state.lock:
            self._progress_at = self._context.now
            step = state.begin(rows, reorder, self._fresh)
            try:
                while not (state.legs and step.is_done):
                    await self._perform(next_action(state, config, self._context.now), step)
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
        self._migrate()
        return torch.cat(step.outputs) if step.outputs else rows.hidden

    async def fork(self, max_length: int | None) -> "SessionSupervisor":
        """A session of its own that goes on from the same rows, for ``max_length`` tokens in each
        (None: as many as here).

        The servers copy what they hold. If one of them cannot (it is lost, is full or leaves), the
        new session takes a route of its own and is fed from this client's log. Raises what ``run``
        raises, nothing held.
        """
        state, spec = self.state, self._context.spec
        fork: SessionSupervisor | None = None
        try:
            # The lock: between two steps all servers hold the rows that are counted here.
            async with state.lock:
                lengths, length = state.confirmed.lengths, max_length or spec.max_length
                spec = replace(spec, num_rows=len(lengths), max_length=length)
                fork = SessionSupervisor(self._swarm, state.blocks, spec)
                fork.state.confirmed.take(state.confirmed.branch())
                fork._begin_life()
                if state.legs and not state.has_diverged:
                    hops = await reserve_forks(fork._context, state.legs, lengths)
                    if hops:
                        await switch(fork._context, (), hops)
            # If there are no hops, an empty step opens a route and feeds it, as after a rebuild.
            nothing = torch.empty(0, spec.hidden_size, dtype=spec.dtype)
            await fork.run(RowSlices.whole_forward(lengths, (0,) * len(lengths), nothing))
        except BaseException:
            if fork is not None:
                await fork.close()
            raise
        return fork

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

    async def _perform(self, action: Action | None, step: PendingStep) -> None:
        match action:
            case Do.RUN:
                await self._run_pieces(step)
            case Do.OPEN_ROUTE:
                await self._open_route(step)
            case Do.REBUILD:
                await self._give_up_route(step)
            case Replace(start, end):
                self._migration.end()
                step.cut(self._piece_tokens, self.state.ids)
                if await repair(self._context, self.state.legs[start:end]):
                    step.history = replace(step.history, waiting_since=None)
            case Redial(legs):
                await self._redial(legs, step)
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
        hops = await reserve_for_step(self._context, (), num_rows, is_first=is_first)
        if not hops:
            return
        await switch(self._context, (), hops)
        if is_first:
            self._begin_life()
            step.history = self._fresh
        else:
            await self._feed(step)
        self._warm_spares()

    def _begin_life(self) -> None:
        """The session has rows from now on: its steps wait for servers, and its leases go on."""
        self._was_open = True
        self._fresh = replace(self._fresh, max_wait_seconds=self._config.repair_timeout)
        self._tasks.start(self._keep_alive(), "keeping a session alive")

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

    async def _give_up_route(self, step: PendingStep) -> None:
        """Free all hops; a new route follows."""
        state = self.state
        self._migration.end()
        book(self._context, state.legs, state.excluded)
        # First out of the state, then freed: a step that is cancelled meanwhile must not leave hops
        # behind that the client itself has closed.
        legs, state.legs, state.has_diverged, step.pieces = state.legs, [], False, []
        await release(legs)

    async def _redial(self, indices: Iterable[int], step: PendingStep) -> None:
        """Open new streams to lost legs, all at the same time."""

        async def redial(leg: HopSession) -> None:
            error = leg.state.error
            if error is not None and not leg.state.is_booked:
                step.history = step.history.after(error, decide(error, step.history))
            await leg.redial()
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
        failure, history = state.failure, replace(step.history, now=self._context.now)
        assert failure is not None
        step.history, state.failure = history.after(failure, decide(failure, history)), None
        if seconds and not step.has_warned:
            step.has_warned = True
            text = "waiting up to %g s, since %s: %s"
            since = self._waiting_since(step)
            logger.warning(text, swarm.config.repair_timeout, since, failure.message)
        step.num_repairs = 0  # the time that waiting takes is limited by itself
        await swarm.node.clock.sleep(seconds)
        await self._redial(legs, step)
        if not legs or any(state.legs[index].state.is_lost for index in legs):
            await swarm.look_again(state.blocks)

    async def _run_pieces(self, step: PendingStep) -> None:
        step.cut(self._piece_tokens, self.state.ids)
        if self.state.losses:
            self._note_repairs()
        await self.state.announce_epoch()
        await run_pieces(self._context, step.pieces)
        now = self._context.now
        if step.settle():
            if step.history.num_failures or step.history.waiting_since is not None:
                step.history = step.history.progressed()
            step.num_repairs, self._progress_at = 0, now
        if step.is_done and now >= self._compare_at:
            self._compare_at = now + self._config.failover.straggler_look_seconds
            self._leave_stragglers()
        if step.is_done and now >= self._warm_spares_at:
            self._warm_spares()

    @property
    def _piece_tokens(self) -> int:
        """Tokens of a piece that all hops take and can work on at the same time."""
        limits = [self.state.max_step_tokens, MAX_ROPE_RUNS]
        if len(self.state.legs) > 1:
            limits.append(self._config.prefill_chunk_tokens)
        return min(limit for limit in limits if limit)

    def _note_repairs(self) -> None:
        """All hops are there again: record which ones replace those that were lost."""
        seconds = self._context.now - self._progress_at
        for lost, reason in self.state.losses.items():
            repair = self.state.note_repair(lost, reason, seconds)
            text = "blocks %s of …%s (%s) are served again after %.2f s: %s"
            by = show(repair.replaced_by)
            logger.info(text, lost.blocks, lost.peer_id[-6:], reason, seconds, by)
            if repair.rounding:
                logger.info("their sums are rounded in another way: %s", repair.rounding)
        self.state.losses.clear()
        self._warm_spares()

    def _waiting_since(self, step: PendingStep) -> str:
        clock = self._swarm.node.clock
        waited = clock.monotonic() - (step.history.waiting_since or clock.monotonic())
        return time.strftime("%H:%M:%S", time.localtime(clock.now() - waited))

    def _leave_stragglers(self) -> None:
        """Have hops replaced, as if they drained, that others would outrun."""
        swarm, config, now = self._swarm, self._config.failover, self._context.now
        for leg in self.state.legs:
            expected = (
                partial(swarm.promised_seconds, leg.hop),
                partial(swarm.alternative_seconds, leg.hop, self._context.spec.cache_tokens),
            )
            may_leave = now >= self._rest_until.get(leg.blocks, now)
            if may_leave and is_straggler(leg.timings, expected, config):
                # Without a rest a session would move back and forth between two slow servers.
                self._rest_until[leg.blocks] = now + config.straggler_rest_seconds
                leg.replace_as_slow()

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
            lease = min((hop.opened.lease_seconds for hop in hops), default=0.0)
            await asyncio.sleep(
                max(lease / config.keepalives_per_lease, config.min_keepalive_seconds)
            )
            for hop in hops:
                # Not one after the other: a server that takes no data must not hold up the rest.
                self._tasks.start(hop.keep(), "sign of life")

    def _on_draining(self, peer: PeerId, seconds: float) -> None:
        """A server has announced that it stops."""
        self._swarm.note_leaving(peer, seconds)
        self._migrate()

    def _migrate(self) -> None:
        if self.state.must_migrate and not self.state.is_closed:
            self._migration.begin()
