"""Work for the compute thread: what the event loop asks for, and where each piece of it stands.

Knows no network, no peers and no order of things.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import torch

from petals.models.adapters import Adapter
from petals.models.batch import Segment
from petals.server.kv_pages import SessionKV
from petals.server.steps import StepPlan, WorkKind
from petals.server.walk import PassRun
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
class Part:
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
