"""Which jobs run next, and how much of each.

Three rules:

- Every urgent job (a decode step) runs whole in the next batch: its client waits for a token.
- Other batchable jobs (prefills) fill the batch up to a time budget, so that the next decode step
  waits at most that long. The budget is converted to tokens by a linear model of the duration of a
  batch, learned from the batches that have run.
- A job that is not batchable (a pass of training) runs alone, cut by the same time budget: when no
  batchable job waits, else after every ``forward_every`` batches, so that it never starves.

Among jobs of one rule the owner that was given the fewest tokens comes first. Values in, values
out: no clock, no thread, no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from petals.server.policies import SchedulerConfig

_LEARNING_RATE = 0.3
_TYPICAL_TOKENS = 64.0
"""Unit of the slope in BatchCost: it brings both unknowns to the same order of magnitude."""

_DECODE_MEMORY_BATCHES = 16
"""Batches after the last urgent job for which the latency budget still applies.

Between two tokens of a session its step travels along the rest of the route. It would find a long
batch running if the idle budget applied as soon as the step had left.
"""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """The properties of a job that the scheduler decides by; see ``jobs.Job``."""

    key: int
    owner: str
    cost_tokens: int
    is_urgent: bool = False
    is_batchable: bool = True


@dataclass(frozen=True, slots=True)
class Portion:
    """``num_tokens`` of job ``key``: of a batchable job exactly, of another one about as many."""

    key: int
    num_tokens: int


class BatchCost:
    """Duration of a batch in seconds: ``fixed + per_token * tokens``, learned from batches."""

    def __init__(self, fixed_seconds: float = 0.0, seconds_per_token: float = 0.003) -> None:
        self._fixed = fixed_seconds
        self._slope = seconds_per_token * _TYPICAL_TOKENS

    @property
    def fixed_seconds(self) -> float:
        """Duration of a batch without tokens."""
        return self._fixed

    def seconds(self, num_tokens: int) -> float:
        """Expected duration of a batch of ``num_tokens``."""
        return self._fixed + self._slope * num_tokens / _TYPICAL_TOKENS

    def tokens_within(self, seconds: float) -> int:
        """Size of the largest batch expected to take at most ``seconds``; at least 0."""
        return max(0, int((seconds - self._fixed) * _TYPICAL_TOKENS / self._slope))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Correct the estimate by one measured batch (normalised least mean squares)."""
        size = num_tokens / _TYPICAL_TOKENS
        correction = _LEARNING_RATE * (seconds - self.seconds(num_tokens)) / (1 + size * size)
        self._fixed = max(0.0, self._fixed + correction)
        self._slope = max(1e-6, self._slope + correction * size)


class _Entry:
    __slots__ = ("done", "job", "order")

    def __init__(self, job: WaitingJob, order: int) -> None:
        self.job = job
        self.done = 0
        self.order = order

    @property
    def remaining(self) -> int:
        return max(0, self.job.cost_tokens - self.done)


class Scheduler:
    """Waiting jobs, and the rules above. A job waits from ``add`` to ``discard``.

    ``next_batch`` decides, ``ran`` reports what the batch has really cost.
    """

    def __init__(self, config: SchedulerConfig, cost: BatchCost | None = None) -> None:
        self._config = config
        self.expect(cost or BatchCost())
        self._entries: dict[int, _Entry] = {}
        self._served: dict[str, int] = {}
        self._num_added = 0
        self._batches_since_urgent = _DECODE_MEMORY_BATCHES
        self._batches_since_alone = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that still have to run."""
        return sum(entry.remaining for entry in self._entries.values())

    @property
    def num_urgent_alone(self) -> int:
        """Number of urgent jobs that wait, if no other job waits; else 0."""
        entries = self._entries.values()
        return len(entries) if all(entry.job.is_urgent for entry in entries) else 0

    @property
    def fixed_seconds(self) -> float:
        """Seconds that one more batch costs, however small it is."""
        return self._batch_cost.fixed_seconds

    def add(self, job: WaitingJob) -> None:
        """Let ``job`` wait.

        An owner without waiting jobs starts level with the owner that was given least: it neither
        pays for tokens of long ago nor may it claim tokens that it did not ask for then.
        """
        floor = min(self._served.values(), default=0)
        self._served[job.owner] = max(self._served.get(job.owner, 0), floor)
        self._entries[job.key] = _Entry(job, self._num_added)
        self._num_added += 1

    def discard(self, keys: Iterable[int]) -> None:
        """Forget jobs, finished or not. Unknown keys are ignored."""
        for key in keys:
            self._entries.pop(key, None)
        owners = {entry.job.owner for entry in self._entries.values()}
        self._served = {o: served for o, served in self._served.items() if o in owners}

    def expect(self, cost: BatchCost) -> None:
        """Begin with this estimate of the duration of batches."""
        self._batch_cost = cost
        # Chunks of a pass are measured apart: a token of theirs attends to no cache.
        self._alone_cost = BatchCost(cost.seconds(0), cost.seconds(1) - cost.seconds(0))

    def next_batch(self) -> tuple[Portion, ...]:
        """The portions to run together now; empty if no job waits."""
        if not self._entries:
            return ()
        alone = self._in_turn(is_batchable=False)
        is_due = self._batches_since_alone >= self._config.forward_every
        if alone and (is_due or len(alone) == len(self._entries)):
            self._batches_since_alone = 0
            self._batches_since_urgent += 1
            return (Portion(alone[0].job.key, self._budget_tokens(0, self._alone_cost)),)
        self._batches_since_alone = self._batches_since_alone + 1 if alone else 0
        batchable = self._in_turn(is_batchable=True)
        urgent = _take_whole(
            [entry for entry in batchable if entry.job.is_urgent], self._config.max_batch_tokens
        )
        self._batches_since_urgent = 0 if urgent else self._batches_since_urgent + 1
        num_urgent = sum(portion.num_tokens for portion in urgent)
        budget_tokens = self._budget_tokens(num_urgent, self._batch_cost)
        rest = [entry for entry in batchable if not entry.job.is_urgent]
        return (*urgent, *_take_cut(rest, budget_tokens))

    def ran(self, batch: Iterable[Portion], seconds: float) -> None:
        """``batch`` has run: each job did ``num_tokens``, and all together took ``seconds``."""
        num_tokens, is_batchable = 0, True
        for portion in batch:
            entry = self._entries[portion.key]
            entry.done += portion.num_tokens
            self._served[entry.job.owner] += portion.num_tokens
            num_tokens += portion.num_tokens
            is_batchable = entry.job.is_batchable
        cost = self._batch_cost if is_batchable else self._alone_cost
        cost.observe(num_tokens, seconds)

    def _budget_tokens(self, num_urgent: int, cost: BatchCost) -> int:
        """Tokens that fit into a batch beside ``num_urgent`` tokens of urgent jobs."""
        config = self._config
        is_busy = self._batches_since_urgent < _DECODE_MEMORY_BATCHES
        seconds = config.latency_budget_seconds if is_busy else config.idle_budget_seconds
        if num_urgent:
            # Where urgent jobs alone use up the budget, prefills still get as much time again.
            seconds = max(seconds, 2 * cost.seconds(num_urgent))
        fitting = cost.tokens_within(seconds) - num_urgent
        return min(max(fitting, config.min_chunk_tokens), config.max_batch_tokens - num_urgent)

    def _in_turn(self, *, is_batchable: bool) -> list[_Entry]:
        """Jobs by what their owner was given, then by what they were given themselves.

        The second key lets the prefills of one owner take turns. A job that is not batchable keeps
        its turn until it is done: it holds memory for activations, which turns would multiply.
        """
        entries = [e for e in self._entries.values() if e.job.is_batchable is is_batchable]
        entries.sort(
            key=lambda entry: (
                self._served[entry.job.owner],
                entry.done if is_batchable else 0,
                entry.order,
            )
        )
        return entries


def _take_whole(entries: Sequence[_Entry], budget_tokens: int) -> list[Portion]:
    """The first jobs as a whole, as long as the budget lasts.

    The very first is cut if no batch could hold it; else it would wait for ever.
    """
    taken: list[Portion] = []
    for entry in entries:
        num_tokens = min(entry.remaining, budget_tokens)
        if taken and num_tokens < entry.remaining:
            break
        taken.append(Portion(entry.job.key, num_tokens))
        budget_tokens -= num_tokens
    return taken


def _take_cut(entries: Sequence[_Entry], budget_tokens: int) -> list[Portion]:
    """The first jobs, the last of them cut to what is left of the budget."""
    taken: list[Portion] = []
    for entry in entries:
        num_tokens = min(entry.remaining, budget_tokens)
        if num_tokens == 0 and entry.remaining:
            break
        taken.append(Portion(entry.job.key, num_tokens))
        budget_tokens -= num_tokens
    return taken
