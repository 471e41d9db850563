"""What the compute thread runs: jobs, alone or several in one packed forward.

There are two kinds: a step of a session (``step_job``) can share a forward with others, a pass of
training (``training.chunked_pass``) runs alone. The executor drives both by the methods below.
Knows no network, no peers and no order of execution.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

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
    ``prepare`` once, parts of the work until ``is_done``, ``result`` once. ``abort`` may come at
    any point.

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
        """Whether nothing is left to run."""

    @abstractmethod
    def prepare(self, device: DeviceContext) -> None:
        """Check the inputs and move them to the device. Raises BadInput and other PetalsErrors."""

    @abstractmethod
    def abort(self) -> None:
        """Release everything the job holds; undo what it has changed. May be called repeatedly."""

    @abstractmethod
    def result(self) -> T:
        """What the caller of ``Executor.run`` receives."""


class ExclusiveJob(Job[T]):
    """A job that runs its parts itself, alone on the device."""

    @abstractmethod
    def run(self, budget_tokens: int) -> int:
        """Run the next part, of a cost of about ``budget_tokens``; return what it has cost."""


class BatchableJob(Job[T]):
    """A job whose parts may share one packed forward with parts of other batchable jobs."""

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
