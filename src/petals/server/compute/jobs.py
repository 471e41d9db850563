"""What the compute thread runs: jobs, and packed batches of those jobs that can share a forward.

There are two kinds of jobs: a step of a session (``step_job``) and a pass of training
(``training.chunked_pass``). The executor drives both by the methods below and knows neither.
Knows no network, no peers and no order of execution.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from petals.models.runtime.batch import Segment
from petals.server.compute.device import DeviceContext

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """The result of a job and its times.

    queue_seconds: from submission to its first batch. compute_seconds: sum over its batches.
    batch_tokens: tokens of its last batch, those of other jobs included.
    """

    value: T
    queue_seconds: float
    compute_seconds: float
    batch_tokens: int


class Job(ABC, Generic[T]):
    """Work that the event loop has asked for. All methods run on the compute thread, in this order:
    ``prepare`` once, ``run`` until ``is_done``, ``result`` once. ``abort`` may come at any point.

    ``owner``: owners share the device equally, however many jobs each of them has.
    """

    owner: str

    @property
    @abstractmethod
    def cost_tokens(self) -> int:
        """Estimated cost of the whole job: the number of tokens whose forward through all blocks of
        the span takes as long. Valid after ``prepare``.
        """

    @property
    def is_urgent(self) -> bool:
        """Whether a client waits for the next token of a text. An urgent job is never cut; the
        others get what its latency budget leaves.
        """
        return False

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether ``run`` has nothing left to do."""

    @abstractmethod
    def prepare(self, device: DeviceContext) -> None:
        """Check the inputs and move them to the device. Raises BadInput and other PetalsErrors."""

    @abstractmethod
    def run(self, budget_tokens: int) -> int:
        """Run the next part, of a cost of about ``budget_tokens``; return what it has cost."""

    @abstractmethod
    def abort(self) -> None:
        """Release everything the job holds; undo what it has changed. May be called repeatedly."""

    @abstractmethod
    def result(self) -> T:
        """What the caller of ``Executor.run`` receives."""


class BatchableJob(Job[T]):
    """A job whose parts may share one packed forward with parts of other batchable jobs."""

    device: DeviceContext

    @property
    @abstractmethod
    def session(self) -> Hashable:
        """The session of the job; the batch window predicts when its next job comes."""

    @abstractmethod
    def segments(self, num_tokens: int) -> list[Segment]:
        """The next ``num_tokens`` tokens, as segments of a packed forward. Changes nothing."""

    @abstractmethod
    def accept(self, num_tokens: int, outputs: Sequence[Tensor]) -> None:
        """Take the outputs [n, H] of those segments; these tokens are now done."""

    def run(self, budget_tokens: int) -> int:
        """See Job."""
        return run_packed([(self, budget_tokens)])[0]


def run_packed(parts: Sequence[tuple[BatchableJob[Any], int]]) -> list[int]:
    """Run the next tokens of several jobs, all on one device, as one forward. Returns the costs.

    If the forward fails, no job has changed and each of them may be run again alone. Steps enter
    the blocks by this one call of ``Runner.run``: a runner may capture a batch of some shape and
    replay it, or spread it over devices, and no job notices.
    """
    segments = [job.segments(num_tokens) for job, num_tokens in parts]
    packed = [segment for own in segments for segment in own]
    outputs = iter(parts[0][0].device.runner.run(packed) if packed else ())
    for (job, num_tokens), own in zip(parts, segments):
        job.accept(num_tokens, [next(outputs) for _ in own])
    return [num_tokens for _, num_tokens in parts]
