"""Runs jobs on the compute thread, the only thread that uses the device and its memory.

Again and again the thread asks the scheduler for a batch and runs it. Whatever else touches KV
memory runs on this thread too, between batches (``call``), so it needs no lock. A job that fails
does not affect the other jobs of its batch. Knows no network, no peers, no messages.
"""

import asyncio
import itertools
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from petals.errors import PeerFailed, PetalsError
from petals.logs import get_logger
from petals.server.compute.batch_window import BatchWindow
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import BatchableJob, Job, Outcome, run_packed
from petals.server.compute.scheduler import Portion, Scheduler, WaitingJob
from petals.server.compute.thread import ComputeThread, attempt, log_failure

logger = get_logger(__name__)
T = TypeVar("T")
_SMOOTHING = 0.2
"""Weight of the newest decode batch in ``step_seconds``."""


class _QueuedJob:
    """A job with its caller's future and its times (``time.perf_counter``)."""

    __slots__ = (
        "batch_tokens",
        "compute_seconds",
        "future",
        "job",
        "key",
        "queued_at",
        "started_at",
    )

    def __init__(self, key: int, job: Job[Any], future: "asyncio.Future[Any]") -> None:
        self.key = key
        self.job = job
        self.future = future
        self.queued_at = time.perf_counter()
        self.started_at = 0.0
        self.compute_seconds = 0.0
        self.batch_tokens = 0


class Executor(ComputeThread):
    """Runs jobs for the event loop that entered it.

    ``call`` works from the beginning, ``run`` and ``call_on_device`` after ``attach``.
    ``waiting_tokens`` and ``step_seconds`` (moving average of batches with decode steps) may be
    read on any thread.
    """

    def __init__(self, scheduler: Scheduler, on_failure: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_failure)
        self._scheduler = scheduler
        self._window = BatchWindow()
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
            seconds = self._wait_seconds()
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

    def _wait_seconds(self) -> float | None:
        """Seconds to wait for the next order before the next batch; None: without limit."""
        if not len(self._scheduler):
            return None
        return self._window.wait_seconds(
            self._scheduler.num_urgent_alone, self._scheduler.fixed_seconds, time.perf_counter()
        )

    def _accept(self, queued: _QueuedJob) -> None:
        key, job = queued.key, queued.job
        self._jobs[key] = queued
        error = attempt(lambda: job.prepare(self._device_or_fail()))[1]
        if error is not None:
            self._fail(queued, error)
            return
        if isinstance(job, BatchableJob):
            if job.is_urgent:
                self._window.step_ready(job.session, time.perf_counter())
            else:
                self._window.forget(job.session)
        is_batchable = isinstance(job, BatchableJob)
        self._scheduler.add(
            WaitingJob(key, job.owner, job.cost_tokens, job.is_urgent, is_batchable)
        )

    def _run_batch(self, batch: Sequence[Portion]) -> None:
        jobs = [self._jobs[portion.key] for portion in batch]
        began = time.perf_counter()
        costs, error = attempt(
            lambda: _run([(queued.job, p.num_tokens) for queued, p in zip(jobs, batch)])
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

    def _finish(self, jobs: Sequence[_QueuedJob], now: float) -> None:
        self._scheduler.discard(queued.key for queued in jobs)
        sessions = [q.job.session for q in jobs if isinstance(q.job, BatchableJob)]
        self._window.batch_done(sessions, now)
        for queued in jobs:
            value, error = attempt(queued.job.result)
            if error is not None:
                self._fail(queued, error)
                continue
            del self._jobs[queued.key]
            outcome = Outcome(
                value=value,
                queue_seconds=queued.started_at - queued.queued_at,
                compute_seconds=queued.compute_seconds,
                batch_tokens=queued.batch_tokens,
            )
            self._answers.append((queued.future, outcome, None))

    def _fail(self, queued: _QueuedJob, error: Exception) -> None:
        self._abort(queued.key)
        self._answers.append((queued.future, None, _as_petals_error(error)))

    def _abort(self, key: int) -> None:
        """Take a job out, wherever it stands; one that is done already stays so."""
        queued = self._jobs.pop(key, None)
        if queued is None:
            return
        self._scheduler.discard([key])
        if isinstance(queued.job, BatchableJob):
            self._window.forget(queued.job.session)
        log_failure(attempt(queued.job.abort)[1])

    def _device_or_fail(self) -> DeviceContext:
        if self._device is None:
            raise _no_blocks()
        return self._device


def _run(parts: Sequence[tuple[Job[Any], int]]) -> list[int]:
    """Run portions of jobs together and return their costs in tokens."""
    if len(parts) == 1:
        ((job, budget_tokens),) = parts
        return [job.run(budget_tokens)]
    # The scheduler puts only batchable jobs together.
    return run_packed(cast(Sequence[tuple[BatchableJob[Any], int]], parts))


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
