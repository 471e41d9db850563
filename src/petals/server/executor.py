"""The one thread that owns the device and everything in its memory.

The event loop hands work in and gets a future back; the thread asks the scheduler for a batch, runs
it through the span and hands the results over in one wake-up. Whatever touches KV memory runs here
too (``call``), between batches, so that nothing needs a lock. Work that fails takes nobody with it.
Knows no network, no peers, no messages.
"""

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from petals.errors import BadInput, PeerFailed, PetalsError, SessionClosed
from petals.logs import get_logger
from petals.models.adapters import Adapter
from petals.models.batch import Segment
from petals.server.gathering import Gathering
from petals.server.kv_pages import SessionKV
from petals.server.scheduler import Portion, Scheduler, Waiting
from petals.server.steps import StepPlan, WorkKind
from petals.types import BlockSpan

logger = get_logger(__name__)
T = TypeVar("T")
_SMOOTHING = 0.2
JOIN_SECONDS = 9.0
"""A call may be in the middle of something long when the end comes; so long it may finish."""
GROWTH_TOKENS = 256
"""A session opened without a length grows by so many tokens at a time."""


class Runner(Protocol):
    """What the executor needs of a span."""

    def run(self, segments: list[Segment]) -> list[torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """hidden: [tokens, H] in the dtype the work asked for, on the CPU. Seconds as measured here."""

    hidden: torch.Tensor
    queue_seconds: float
    compute_seconds: float
    batch_tokens: int


@dataclass(slots=True, eq=False)
class Work:
    """A checked step (or a pass that keeps nothing). hidden: [plan.num_tokens, H], floating, on the
    CPU.

    ``adapter`` is in the dtype and on the device of the blocks. ``owner`` shares the device fairly
    with other owners. The rows of ``kv`` belong to this work until it is done; ``begun`` tells
    whether they have been touched (reordered, cut to where the work begins).
    """

    kv: SessionKV
    blocks: BlockSpan
    plan: StepPlan
    hidden: torch.Tensor
    out_dtype: torch.dtype
    owner: str
    kind: WorkKind
    adapter: Adapter | None = None
    begun: bool = False


class _Running:
    """A piece of work as the compute thread sees it."""

    __slots__ = (
        "batch",
        "began",
        "compute",
        "done",
        "future",
        "hidden",
        "key",
        "outputs",
        "queued",
        "work",
    )

    def __init__(self, key: int, work: Work, future: "asyncio.Future[Outcome]") -> None:
        self.key = key
        self.work = work
        self.future = future
        self.hidden = work.hidden
        self.outputs: list[torch.Tensor] = []
        self.done = 0
        self.queued = time.perf_counter()
        self.began = 0.0
        self.compute = 0.0
        self.batch = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The share that one piece of work has in a batch."""

    running: _Running
    num_tokens: int
    segments: list[Segment]


class Executor:
    """Runs work for the event loop that entered it (an async context manager).

    ``call`` works from the beginning, ``run`` after ``attach``. ``waiting_tokens`` and
    ``step_seconds`` (a recent average over batches that decode) may be read from any thread.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._gathering = Gathering()
        self._runner: Runner | None = None
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._keys = itertools.count()
        self._answers: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        self._thread = threading.Thread(target=self._work, name="petals-compute", daemon=True)
        self._closed = False
        self.step_seconds = 0.0
        self.waiting_tokens = 0

    def attach(self, runner: Runner, device: torch.device, dtype: torch.dtype) -> None:
        """Let ``runner`` do the work; states reach it on ``device`` in ``dtype``."""
        self._runner, self._device, self._dtype = runner, device, dtype

    def placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A floating tensor where and as the blocks are. For ``call``."""
        return tensor.to(self._device, self._dtype)

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
        running = _Running(next(self._keys), work, future)
        self._inbox.put(lambda: self._accept(running))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._give_up(running))
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` between batches; return what it returns, raise what it raises."""
        future: asyncio.Future[T] = self._new_future()
        self._inbox.put(lambda: self._answers.append((future, *_attempt(function))))
        return await future

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
            if batch:
                self._run_batch(batch)
        for running in list(self._running.values()):
            self._fail(
                running, SessionClosed("The server is stopping.", hint="Ask another server.")
            )
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

    def _accept(self, running: _Running) -> None:
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
        self._scheduler.add(Waiting(running.key, work.owner, work.kind, work.plan.num_tokens))

    def _prepare(self, running: _Running) -> None:
        """Check the numbers, then bring the rows to where the work begins."""
        work = running.work
        if work.hidden.numel():
            low, high = torch.aminmax(work.hidden)
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise BadInput(
                    "The hidden states hold NaN or infinity.",
                    hint="Look at the inputs, or at the blocks that ran before these.",
                )
        longest = max(work.plan.lengths_after, default=0)
        if longest > work.kv.max_length:
            work.kv.extend(-(-longest // GROWTH_TOKENS) * GROWTH_TOKENS)
        if work.plan.reorder is not None:
            work.kv.reorder(work.plan.reorder)
        work.begun = True
        _cut(work)
        running.hidden = self.placed(work.hidden)

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
        for part in parts:
            self._account(part, seconds, num_tokens)
        if parts[0].running.work.kind is WorkKind.DECODE:
            self.step_seconds += _SMOOTHING * (seconds - self.step_seconds)

    def _part(self, portion: Portion, now: float) -> _Part:
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
            )
            for piece in work.plan.pieces(running.done, portion.num_tokens)
        ]
        return _Part(running, portion.num_tokens, segments)

    def _try_together(self, parts: Sequence[_Part]) -> Exception | None:
        segments = [segment for part in parts for segment in part.segments]
        if not segments:
            return None
        outputs, error = _attempt(lambda: self._runner_or_fail().run(segments))
        if error is None:
            remaining = iter(outputs)
            for part in parts:
                part.running.outputs += [next(remaining) for _ in part.segments]
        return error

    def _runner_or_fail(self) -> Runner:
        if self._runner is None:
            raise PeerFailed("The server has no blocks yet.", hint="Ask again in a minute.")
        return self._runner

    def _try_alone(self, part: _Part) -> None:
        error = self._try_together([part])
        if error is not None:
            self._fail(part.running, error)

    def _account(self, part: _Part, seconds: float, batch_tokens: int) -> None:
        running = part.running
        if running.key not in self._running:
            return
        running.done += part.num_tokens
        running.compute += seconds
        running.batch = batch_tokens
        if running.done < running.work.plan.num_tokens:
            return
        del self._running[running.key]
        self._gathering.answered(id(running.work.kv), time.perf_counter())
        outcome, error = _attempt(lambda: _outcome(running))
        self._answers.append((running.future, outcome, error))

    def _fail(self, running: _Running, error: Exception) -> None:
        self._give_up(running)
        self._answer_error(running, error)

    def _answer_error(self, running: _Running, error: Exception) -> None:
        if not isinstance(error, PetalsError):
            logger.error("A step failed.", exc_info=error)
            error = PeerFailed(
                f"The server failed in the middle of a step: {type(error).__name__}.",
                hint="Its operator finds the reason in the server's log.",
            )
        self._answers.append((running.future, None, error))

    def _give_up(self, running: _Running) -> None:
        """Take work out, wherever it stands, and leave its rows where it began."""
        if self._running.pop(running.key, None) is None:
            return
        self._scheduler.discard(running.key)
        _log_failure(_attempt(lambda: _cut(running.work))[1])


def _cut(work: Work) -> None:
    """Let every row end where the work begins."""
    for row, start in enumerate(work.plan.starts):
        work.kv.truncate(row, start)


def _outcome(running: _Running) -> Outcome:
    work = running.work
    # A copy even of one piece: a view would keep the whole batch in memory for as long as the
    # answer is kept.
    joined = torch.cat(running.outputs) if running.outputs else work.hidden
    return Outcome(
        hidden=joined.to("cpu", work.out_dtype),
        queue_seconds=running.began - running.queued,
        compute_seconds=running.compute,
        batch_tokens=running.batch,
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
