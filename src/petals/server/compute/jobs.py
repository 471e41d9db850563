"""Work for the compute thread: what the event loop asks for, and where each piece of it stands.

Knows no network, no peers and no order of things.
"""

import asyncio
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.batch import Segment
from petals.server.compute.device import DeviceContext
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_plan import StepPlan, WorkKind
from petals.types import BlockSpan

GROWTH_TOKENS = 256
"""A session opened without a length grows by so many tokens at a time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """hidden: [tokens, H] in the dtype the work asked for, on the CPU. Seconds as measured here."""

    hidden: torch.Tensor
    queue_seconds: float
    compute_seconds: float
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds that a pass has waited for its first unit, and run."""

    queue_seconds: float
    compute_seconds: float


@dataclass(slots=True, eq=False)
class Work:
    """A checked step. hidden: [plan.num_tokens, H], floating, on the CPU. prompts: for each block
    [P, H], on the device; adapter: on the device, too.

    ``owner`` shares the device fairly with other owners. The rows of ``kv`` belong to this work
    until it is done; ``begun`` tells whether they have been touched (reordered, cut to where the
    work begins).
    """

    kv: SessionKV
    blocks: BlockSpan
    plan: StepPlan
    hidden: torch.Tensor
    out_dtype: torch.dtype
    owner: str
    kind: WorkKind
    prompts: torch.Tensor | None = None
    adapter: Adapter | None = None
    begun: bool = False


class ChunkedWork(Protocol):
    """A pass that runs unit by unit; ``cost_tokens`` counts tokens through the whole span."""

    place: DeviceContext
    cost_tokens: int
    units: Generator[None, int, None]

    def give_up(self) -> None: ...


W = TypeVar("W", bound=ChunkedWork)


class PassRun(Generic[W]):
    """A pass as the executor drives it, on behalf of ``owner``.

    ``start`` makes its walk, ``finish`` takes what the walk has found; both run on the compute
    thread. ``cost_tokens``: what all of it is worth, in tokens through the whole span.
    """

    def __init__(
        self,
        owner: str,
        cost_tokens: int,
        start: Callable[[DeviceContext], W],
        finish: Callable[[W], None],
    ) -> None:
        self.owner = owner
        self.cost_tokens = cost_tokens
        self.is_done = False
        self._start, self._finish = start, finish
        self._walk: W | None = None

    def begin(self, place: DeviceContext) -> None:
        """Look at the inputs. Raises BadInput and what ``start`` raises."""
        self._walk = self._start(place)
        next(self._walk.units, None)  # to before its first unit, if it has any

    def unit(self, room: int) -> int:
        """Run the next unit, of about ``room``; returns what it was worth."""
        walk = self._walk
        assert walk is not None
        before = walk.cost_tokens
        try:
            walk.units.send(room)
        except StopIteration:
            self.is_done = True
            self._finish(walk)
            self._walk = None
        if walk.place.device.type == "cuda":
            # The next batch waits for it in any case, and who plans must know how long it takes.
            torch.cuda.synchronize(walk.place.device)
        return walk.cost_tokens - before

    def give_up(self) -> None:
        """Let everything go."""
        if self._walk is not None:
            self._walk.units.close()
            self._walk.give_up()


class RunningPass:
    """A pass as the compute thread sees it."""

    __slots__ = ("began", "compute", "future", "key", "queued", "work")

    def __init__(self, key: int, work: PassRun[Any], future: "asyncio.Future[PassTimes]") -> None:
        self.key = key
        self.work = work
        self.future = future
        self.queued = time.perf_counter()
        self.began = 0.0
        self.compute = 0.0


class Running:
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


def arrange_rows(kv: SessionKV, plan: StepPlan) -> None:
    """Room for a step, and its rows in its order. Raises CacheFull or RequestTooLarge."""
    longest = max(plan.lengths_after, default=0)
    if longest > kv.max_length:
        kv.extend(-(-longest // GROWTH_TOKENS) * GROWTH_TOKENS)
    if plan.reorder is not None:
        kv.reorder(plan.reorder)


def cut_rows(kv: SessionKV, plan: StepPlan) -> None:
    """Let every row end where the step begins."""
    for row, start in enumerate(plan.starts):
        kv.truncate(row, start)


@dataclass(frozen=True, slots=True, eq=False)
class BatchShare:
    """The share that one piece of work has in a batch."""

    running: Running
    num_tokens: int
    segments: list[Segment]


def outcome_of(running: Running) -> Outcome:
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
