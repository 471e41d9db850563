"""The one thread that owns the device and everything in its memory.

The event loop hands work in and gets a future back; the thread asks the scheduler for a batch, runs
it through the span and hands the results over in one wake-up. Whatever touches KV memory runs here
too (``call``), between batches, so that nothing needs a lock. Work that fails takes nobody with it.
Knows no network, no peers, no messages.
"""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from petals.errors import PeerFailed, PetalsError, SessionClosed
from petals.logs import get_logger
from petals.models.runtime.batch import Segment
from petals.server.compute.batch_window import BatchWindow
from petals.server.compute.device import DeviceContext, place_states
from petals.server.compute.jobs import (
    BatchShare,
    Outcome,
    PassRun,
    PassTimes,
    Running,
    RunningPass,
    Work,
    arrange_rows,
    cut_rows,
    outcome_of,
)
from petals.server.compute.scheduler import Portion, Scheduler, WaitingWork
from petals.server.compute.step_plan import WorkKind

logger = get_logger(__name__)
T = TypeVar("T")
_SMOOTHING = 0.2
JOIN_SECONDS = 9.0
"""A call may be in the middle of something long when the end comes; so long it may finish."""


class Executor:
    """Runs work for the event loop that entered it (an async context manager).

    ``call`` works from the beginning, ``run`` after ``attach``. ``waiting_tokens`` and
    ``step_seconds`` (a recent average over batches that decode) may be read from any thread.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._gathering = BatchWindow()
        self._place: DeviceContext | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[int, Running] = {}
        self._passes: dict[int, RunningPass] = {}
        self._keys = itertools.count()
        self._answers: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        self._thread = threading.Thread(target=self._work, name="petals-compute", daemon=True)
        self._closed = False
        self.step_seconds = 0.0
        self.waiting_tokens = 0

    def attach(self, place: DeviceContext) -> None:
        """Let the work be done there."""
        self._place = place

    def detach(self) -> None:
        """The place is done with; ``run`` fails until another is attached."""
        self._place = None

    async def __aenter__(self) -> "Executor":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    async def run(self, work: Work) -> Outcome:
        """Run ``work`` in one or more batches.

        Raises BadInput (NaN or infinity in ``hidden``), CacheFull, PeerFailed (whatever went wrong
        in the model) and SessionClosed (the executor stops). After an error the rows end where the
        work began. A caller that is cancelled gives the work up; a ``call`` made after that finds
        the rows at rest.
        """
        future: asyncio.Future[Outcome] = self._new_future()
        running = Running(next(self._keys), work, future)
        self._inbox.put(lambda: self._accept(running))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._give_up(running))
            raise

    async def run_pass(self, work: PassRun[Any]) -> PassTimes:
        """Run a pass, unit by unit, between the batches of sessions.

        Raises BadInput and whatever else its walk raises, PeerFailed and SessionClosed as ``run``.
        A caller that is cancelled gives the pass up.
        """
        future: asyncio.Future[PassTimes] = self._new_future()
        running = RunningPass(next(self._keys), work, future)
        self._inbox.put(lambda: self._accept_pass(running))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._give_up_pass(running))
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` between batches; return what it returns, raise what it raises."""
        future: asyncio.Future[T] = self._new_future()
        self._inbox.put(lambda: self._answers.append((future, *_attempt(function))))
        return await future

    async def at_place(self, function: Callable[[DeviceContext], T]) -> T:
        """``call`` with the place where the blocks are."""
        return await self.call(lambda: function(self._place_or_fail()))

    def post(self, function: Callable[[], object]) -> None:
        """Like ``call`` for those who do not wait."""
        self._inbox.put(lambda: _log_failure(_attempt(function)[1]))

    def _new_future(self) -> "asyncio.Future[Any]":
        if self._closed:
            raise SessionClosed("The server is stopping.", hint="Ask another server.")
        return self._loop.create_future()

    # -- on the compute thread from here on
    # ----------------------------------------------------------------------

    def _work(self) -> None:
        while self._serve_inbox():
            batch = self._scheduler.next_batch()
            if batch and batch[0].key in self._passes:
                self._run_unit(self._passes[batch[0].key], batch[0].num_tokens)
            elif batch:
                self._run_batch(batch)
        end = SessionClosed("The server is stopping.", hint="Ask another server.")
        for running in list(self._running.values()):
            self._fail(running, end)
        for passing in list(self._passes.values()):
            self._fail_pass(passing, end)
        self._hand_over()

    def _serve_inbox(self) -> bool:
        """Take every order that waits, and wait for one if there is nothing to run or if company
        is worth waiting for. False: the end.
        """
        while True:
            self._hand_over()
            seconds = self._patience()
            try:
                order = self._inbox.get(block=seconds != 0, timeout=seconds)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _patience(self) -> float | None:
        """Seconds to wait for the next order before the next batch; None: as long as it takes."""
        if not len(self._scheduler):
            return None
        num_decodes = self._scheduler.num_decodes_alone
        return self._gathering.patience(
            num_decodes, self._scheduler.fixed_seconds, time.perf_counter()
        )

    def _hand_over(self) -> None:
        self.waiting_tokens = self._scheduler.waiting_tokens
        if self._answers:
            answers, self._answers = self._answers, []
            self._loop.call_soon_threadsafe(_deliver, answers)

    def _accept(self, running: Running) -> None:
        error = _attempt(lambda: self._prepare(running))[1]
        if error is not None:
            self._answer_error(running, error)
            return
        work = running.work
        self._running[running.key] = running
        if work.kind is WorkKind.DECODE:
            self._gathering.arrived(id(work.kv), time.perf_counter())
        else:
            self._gathering.forget(id(work.kv))
        self._scheduler.add(WaitingWork(running.key, work.owner, work.kind, work.plan.num_tokens))

    def _prepare(self, running: Running) -> None:
        """Check the numbers, then bring the rows to where the work begins."""
        work = running.work
        running.hidden = place_states(self._place_or_fail(), work.hidden)
        arrange_rows(work.kv, work.plan)
        work.begun = True
        cut_rows(work.kv, work.plan)

    def _accept_pass(self, running: RunningPass) -> None:
        work = running.work
        error = _attempt(lambda: work.begin(self._place_or_fail()))[1]
        if error is not None:
            self._fail_pass(running, error)
            return
        self._passes[running.key] = running
        self._scheduler.add(
            WaitingWork(running.key, work.owner, WorkKind.FORWARD, work.cost_tokens)
        )

    def _run_unit(self, running: RunningPass, room: int) -> None:
        began = time.perf_counter()
        running.began = running.began or began
        cost_tokens, error = _attempt(lambda: running.work.unit(room))
        if error is not None:
            self._fail_pass(running, error)
            return
        seconds = time.perf_counter() - began
        running.compute += seconds
        self._scheduler.advance(running.key, cost_tokens, seconds)
        if running.work.is_done:
            self._scheduler.discard(running.key)
            del self._passes[running.key]
            times = PassTimes(running.began - running.queued, running.compute)
            self._answers.append((running.future, times, None))

    def _fail_pass(self, running: RunningPass, error: Exception) -> None:
        self._give_up_pass(running)
        self._answers.append((running.future, None, _as_petals_error(error)))

    def _give_up_pass(self, running: RunningPass) -> None:
        self._passes.pop(running.key, None)
        self._scheduler.discard(running.key)
        _log_failure(_attempt(running.work.give_up)[1])

    def _run_batch(self, batch: Sequence[Portion]) -> None:
        began = time.perf_counter()
        parts = [self._part(portion, began) for portion in batch]
        num_tokens = sum(part.num_tokens for part in parts)
        error = self._try_together(parts)
        seconds = time.perf_counter() - began
        if error is None:
            self._scheduler.observe(num_tokens, seconds)
        elif len(parts) == 1:
            self._fail(parts[0].running, error)
        else:
            logger.warning("A batch of %d failed (%s); running it one by one.", len(parts), error)
            for part in parts:
                self._try_alone(part)
        done = [part.running for part in parts if self._account(part, seconds, num_tokens)]
        self._gathering.answered([id(running.work.kv) for running in done], time.perf_counter())
        if parts[0].running.work.kind is WorkKind.DECODE:
            self.step_seconds += _SMOOTHING * (seconds - self.step_seconds)

    def _part(self, portion: Portion, now: float) -> BatchShare:
        running = self._running[portion.key]
        work = running.work
        running.began = running.began or now
        segments = [
            Segment(
                hidden=running.hidden[piece.offset : piece.offset + piece.count],
                blocks=work.blocks,
                row=work.kv.rows[piece.row],
                start=piece.start,
                adapter=work.adapter,
                prompts=work.prompts,
            )
            for piece in work.plan.pieces(running.done, portion.num_tokens)
        ]
        return BatchShare(running, portion.num_tokens, segments)

    def _try_together(self, parts: Sequence[BatchShare]) -> Exception | None:
        segments = [segment for part in parts for segment in part.segments]
        if not segments:
            return None
        outputs, error = _attempt(lambda: self._place_or_fail().runner.run(segments))
        if error is None:
            remaining = iter(outputs)
            for part in parts:
                part.running.outputs += [next(remaining) for _ in part.segments]
        return error

    def _place_or_fail(self) -> DeviceContext:
        if self._place is None:
            raise PeerFailed("The server has no blocks yet.", hint="Ask again in a minute.")
        return self._place

    def _try_alone(self, part: BatchShare) -> None:
        error = self._try_together([part])
        if error is not None:
            self._fail(part.running, error)

    def _account(self, part: BatchShare, seconds: float, batch_tokens: int) -> bool:
        """Whether its work is done with this batch."""
        running = part.running
        if running.key not in self._running:
            return False
        running.done += part.num_tokens
        running.compute += seconds
        running.batch = batch_tokens
        if running.done < running.work.plan.num_tokens:
            return False
        del self._running[running.key]
        outcome, error = _attempt(lambda: outcome_of(running))
        self._answers.append((running.future, outcome, error))
        return True

    def _fail(self, running: Running, error: Exception) -> None:
        self._give_up(running)
        self._answer_error(running, error)

    def _answer_error(self, running: Running, error: Exception) -> None:
        self._answers.append((running.future, None, _as_petals_error(error)))

    def _give_up(self, running: Running) -> None:
        """Take work out, wherever it stands, and leave its rows where it began."""
        if self._running.pop(running.key, None) is None:
            return
        self._gathering.forget(id(running.work.kv))
        self._scheduler.discard(running.key)
        _log_failure(_attempt(lambda: cut_rows(running.work.kv, running.work.plan))[1])


def _as_petals_error(error: Exception) -> PetalsError:
    if isinstance(error, PetalsError):
        return error
    logger.error("A step failed.", exc_info=error)
    return PeerFailed(
        f"The server failed in the middle of a step: {type(error).__name__}.",
        hint="Its operator finds the reason in the server's log.",
    )


def _attempt(function: Callable[[], T]) -> tuple[Any, Exception | None]:
    """What ``function`` returned, or what it raised:

    the compute thread outlives everybody's errors.
    """
    try:
        return function(), None
    except Exception as error:
        return None, error


def _log_failure(error: Exception | None) -> None:
    if error is not None:
        logger.error("Housekeeping on the compute thread failed.", exc_info=error)


def _deliver(answers: Sequence[tuple["asyncio.Future[Any]", Any, Exception | None]]) -> None:
    for future, value, error in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
