"""Runs jobs on the compute thread, the only thread that uses the device and its memory.

The event loop puts orders into a queue and awaits a future for each; the thread hands all answers
it has over in one wake-up of the loop. Between orders the thread asks the scheduler for a batch and
runs it. Whatever else touches KV memory runs on this thread too, between batches (``call``), so it
needs no lock. A job that fails does not affect the other jobs of its batch. A thread that ends, in
whatever way, leaves no future unanswered. Knows no network, no peers, no messages.
"""

import asyncio
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, cast

from petals.errors import PeerFailed, PetalsError, SessionClosed
from petals.logs import get_logger
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import BatchableJob, ExclusiveJob, Job, Outcome
from petals.server.compute.scheduler import Portion, Scheduler, WaitingJob

logger = get_logger(__name__)
T = TypeVar("T")
Order = Callable[[], None]
Answer = tuple["asyncio.Future[Any]", Any, Exception | None]

_JOIN_SECONDS = 9.0
"""Longest wait at the end for the batch or call that is running; then the thread is abandoned."""

_SMOOTHING = 0.2
"""Weight of the newest decode batch in ``step_seconds``."""


class ComputeThread(ABC):
    """Works for the event loop that entered it (an async context manager).

    ``on_failure`` is called on the event loop if the thread ends by an error; every caller then
    gets PeerFailed, those that wait as well as those that come later. After a regular end they get
    SessionClosed.
    """

    def __init__(self, on_failure: Callable[[], None] = lambda: None) -> None:
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=self._work, name="petals-compute", daemon=True)
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._refusal: Callable[[], PetalsError] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._refusal = self._refusal or _stopping
        self._inbox.put(None)
        try:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
        finally:
            self._refuse_all(_stopping)

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the thread, between batches; return or raise what it does."""
        result: T = await self._ask(
            lambda future: self._answers.append((future, *_attempt(function)))
        )
        return result

    def post(self, function: Callable[[], object]) -> None:
        """``call`` for callers that do not wait; an error is logged."""
        self._inbox.put(lambda: _log_failure(_attempt(function)[1]))

    async def _ask(self, order: "Callable[[asyncio.Future[Any]], None]") -> Any:
        """Let the thread do ``order``, which sees to it that the future is answered."""
        if self._refusal is not None:
            raise self._refusal()
        future = self._loop.create_future()
        self._unanswered.add(future)
        self._inbox.put(lambda: order(future))
        try:
            return await future
        finally:
            self._unanswered.discard(future)

    def _refuse_all(self, refusal: Callable[[], PetalsError]) -> None:
        """Answer everything that waits, and everything that comes later, with this error.

        Runs on the event loop, which alone makes futures and puts orders into the inbox: so an
        order that the thread had not seen when it ended cannot be overlooked.
        """
        self._refusal = refusal
        for future in self._unanswered:
            if not future.done():
                future.set_exception(refusal())

    def _failed(self) -> None:
        self._refuse_all(_thread_has_failed)
        self._on_failure()

    # On the thread from here on.

    @abstractmethod
    def _serve(self) -> None:
        """Do orders until ``None`` comes. An error of it ends the thread."""

    def _work(self) -> None:
        error, is_regular_end = None, False
        try:
            error = _attempt(self._serve)[1]
            is_regular_end = error is None
        finally:
            # Also after SystemExit, which the code of a model may raise.
            if not is_regular_end:
                logger.critical("The compute thread has failed.", exc_info=error or True)
                if not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._failed)

    def _deliver_answers(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._loop.call_soon_threadsafe(_deliver, answers)


@dataclass(slots=True, eq=False)
class _QueuedJob:
    """A job with its caller's future and its times (``time.perf_counter``)."""

    key: int
    job: Job[Any]
    future: "asyncio.Future[Any]"
    queued_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    compute_seconds: float = 0.0
    batch_tokens: int = 0


class Executor(ComputeThread):
    """Runs jobs for the event loop that entered it.

    ``call`` works from the beginning, ``run`` and ``call_on_device`` after ``attach``.
    ``waiting_tokens`` and ``step_seconds`` (moving average of batches with decode steps) may be
    read on any thread.
    """

    def __init__(self, scheduler: Scheduler, on_failure: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_failure)
        self._scheduler = scheduler
        self._device: DeviceContext | None = None
        self._check_when_idle: Callable[[], None] | None = None
        self._jobs: dict[int, _QueuedJob] = {}
        self._keys = itertools.count()
        self.step_seconds = 0.0
        self.waiting_tokens = 0

    def attach(
        self, device: DeviceContext, check_when_idle: Callable[[], None] | None = None
    ) -> None:
        """Let jobs run on ``device``. ``check_when_idle`` runs on the compute thread whenever no
        job and no call waits; an error of it ends the thread.
        """
        self._check_when_idle = check_when_idle
        self._device = device

    def detach(self) -> None:
        """Fail the jobs that are left, and refuse new ones until the next ``attach``.

        Call it on the compute thread: jobs refer to the blocks, which are freed after this.
        """
        self._device = self._check_when_idle = None
        for queued in list(self._jobs.values()):
            self._fail(queued, _no_blocks())

    async def run(self, job: Job[T]) -> Outcome[T]:
        """Run ``job`` in one or more batches.

        Raises what the methods of the job raise, PeerFailed in place of anything that is no
        PetalsError, and SessionClosed when the executor stops. After an error, or if the caller is
        cancelled, the job is aborted; a ``call`` made after that finds everything as ``abort``
        leaves it.
        """
        key = next(self._keys)
        try:
            outcome: Outcome[T] = await self._ask(
                lambda future: self._accept(_QueuedJob(key, job, future))
            )
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._abort(key))
            raise
        return outcome

    async def call_on_device(self, function: Callable[[DeviceContext], T]) -> T:
        """``call`` with the device context. Raises PeerFailed while none is attached."""
        return await self.call(lambda: function(self._device_or_fail()))

    # On the compute thread from here on.

    def _serve(self) -> None:
        while self._take_orders():
            batch = self._scheduler.next_batch()
            if batch:
                self._run_batch(batch)
        self._deliver_answers()

    def _take_orders(self) -> bool:
        """Do every order in the inbox. Wait for one if no job can run, or while the batch window is
        open. False: the end.
        """
        while True:
            self.waiting_tokens = self._scheduler.waiting_tokens
            self._deliver_answers()
            seconds = self._scheduler.wait_seconds(time.perf_counter())
            if seconds is None and self._check_when_idle is not None and self._inbox.empty():
                self._check_when_idle()
            try:
                order = self._inbox.get(block=seconds != 0, timeout=seconds)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            # The next order may be long in coming; this one refers to a job and its tensors.
            del order

    def _accept(self, queued: _QueuedJob) -> None:
        key, job = queued.key, queued.job
        self._jobs[key] = queued
        error = _attempt(lambda: job.prepare(self._device_or_fail()))[1]
        if error is not None:
            self._fail(queued, error)
            return
        session = job.session if isinstance(job, BatchableJob) else None
        waiting = WaitingJob(key, job.owner, job.cost_tokens, session, job.is_urgent)
        self._scheduler.add(waiting, time.perf_counter())

    def _run_batch(self, batch: Sequence[Portion]) -> None:
        jobs = [self._jobs[portion.key] for portion in batch]
        began = time.perf_counter()
        costs, error = _attempt(
            lambda: self._run_parts([(q.job, p.num_tokens) for q, p in zip(jobs, batch)])
        )
        now = time.perf_counter()
        if error is not None and len(batch) > 1:
            # One of them has bad values, perhaps, or together they need too much memory. A failed
            # forward has changed no job, so each can show alone whether it is the one.
            logger.warning("A batch of %d jobs failed (%s); each runs alone.", len(batch), error)
            for portion in batch:
                self._run_batch([portion])
        elif error is not None:
            self._fail(jobs[0], error)
        else:
            for queued in jobs:
                queued.started_at = queued.started_at or began
                queued.compute_seconds += now - began
                queued.batch_tokens = sum(costs)
            self._scheduler.ran([Portion(p.key, c) for p, c in zip(batch, costs)], now - began)
            if jobs[0].job.is_urgent:
                self.step_seconds += _SMOOTHING * (now - began - self.step_seconds)
            self._finish([queued for queued in jobs if queued.job.is_done], now)

    def _run_parts(self, parts: Sequence[tuple[Job[Any], int]]) -> list[int]:
        """Run so many tokens of each job and return the costs. A forward that fails has changed no
        job.

        Steps enter the blocks by this one call of ``Runner.run``: a runner may capture a batch of
        some shape and replay it, or spread it over devices, and no job notices.
        """
        job, budget_tokens = parts[0]
        if isinstance(job, ExclusiveJob):
            return [job.run(budget_tokens)]
        batchable = cast(Sequence[tuple[BatchableJob[Any], int]], parts)
        segments = [job.segments(num_tokens) for job, num_tokens in batchable]
        packed = [segment for own in segments for segment in own]
        outputs = iter(self._device_or_fail().runner.run(packed) if packed else ())
        for (job, num_tokens), own in zip(batchable, segments):
            job.accept(num_tokens, [next(outputs) for _ in own])
        return [num_tokens for _, num_tokens in batchable]

    def _finish(self, jobs: Sequence[_QueuedJob], now: float) -> None:
        finished = []
        for queued in jobs:
            value, error = _attempt(queued.job.result)
            if error is not None:
                self._fail(queued, error)
                continue
            del self._jobs[queued.key]
            finished.append(queued.key)
            outcome = Outcome(
                value=value,
                queue_seconds=queued.started_at - queued.queued_at,
                compute_seconds=queued.compute_seconds,
                batch_tokens=queued.batch_tokens,
            )
            self._answers.append((queued.future, outcome, None))
        self._scheduler.finish(finished, now)

    def _fail(self, queued: _QueuedJob, error: Exception) -> None:
        self._abort(queued.key)
        self._answers.append((queued.future, None, _as_petals_error(error)))

    def _abort(self, key: int) -> None:
        """Take a job out, wherever it stands; one that is done already stays so."""
        queued = self._jobs.pop(key, None)
        if queued is None:
            return
        self._scheduler.discard(key)
        _log_failure(_attempt(queued.job.abort)[1])

    def _device_or_fail(self) -> DeviceContext:
        if self._device is None:
            raise _no_blocks()
        return self._device


def _attempt(function: Callable[[], T]) -> tuple[Any, Exception | None]:
    """(result, None) or (None, error): an error belongs to its caller, the thread lives on."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _log_failure(error: Exception | None) -> None:
    """Log an error that no caller waits for."""
    if error is not None:
        logger.error("Housekeeping on the compute thread failed.", exc_info=error)


def _deliver(answers: Sequence[Answer]) -> None:
    for future, value, error in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _stopping() -> PetalsError:
    return SessionClosed("The server is stopping.", hint="Ask another server.")


def _thread_has_failed() -> PetalsError:
    return PeerFailed(
        "The server's compute thread has failed; it can compute no more.",
        hint="Use another server. Its operator finds the reason in the server's log.",
    )


def _as_petals_error(error: Exception) -> PetalsError:
    if isinstance(error, PetalsError):
        return error
    logger.error("A job failed.", exc_info=error)
    return PeerFailed(
        f"The server failed in the middle of a step: {type(error).__name__}.",
        hint="Its operator finds the reason in the server's log.",
    )


def _no_blocks() -> PetalsError:
    return PeerFailed("The server has no blocks yet.", hint="Ask again in a minute.")
