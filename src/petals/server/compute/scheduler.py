"""Which jobs run next, how much of each, and how long a batch waits for more of them.

Three rules choose a batch:

- Every urgent job (a decode step) runs whole in the next batch: its client waits for a token.
- Other batchable jobs (prefills) fill the batch up to a time budget, so that the next decode step
  waits at most that long. The budget is converted to tokens by a linear model of the duration of a
  batch, learned from the batches that have run.
- A job that is not batchable (a pass of training) runs alone, cut by the same time budget: when no
  batchable job waits, else after every ``forward_every`` batches, so that it never starves.

Among jobs of one rule the owner that was given the fewest tokens comes first.

If decode steps alone wait, the batch waits for the steps of other sessions (``BatchWindow``): a
batch costs a fixed time and little more for each token, so one batch of four steps is cheaper than
four batches. Two things make the arrival of a step predictable: sessions whose steps ran in one
batch (batch peers) return at about the same time, and a session stays away (the rest of its route
and its client's own work) about as long as before. So, in units of the fixed time of a batch and
counted from when the first step was ready:

- for a batch peer of a ready step wait until 1.5, unless it is expected only after 3.5;
- for any other session wait while it is expected within the next 1, until 2 at most;
- after an arrival wait for another 0.15: sessions that shared a batch at the server before arrive
  one right after the other.

A session that misses its batch loses its batch peers, so it delays at most one batch. A simulation
of 8 sessions on 3 servers and 2 cores gave 29 tokens/s with these figures, 27 without batch peers
and 21 without any waiting.

Values in, values out: no clock, no thread, no torch. All times are in seconds.
"""

from collections.abc import Hashable, Iterable, Sequence
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

_ABSENCE_SMOOTHING = 0.3
"""Weight of the newest absence in a session's average absence."""

_PEERS_WAIT = 1.5
_OTHERS_WAIT = 2.0
"""Longest wait for batch peers, for other sessions; in fixed times since the first ready step."""

_PEERS_DUE = 3.5
"""A batch peer expected later than this (same unit) has a longer route now: waiting is useless."""

_GRACE = 0.15
"""Wait after an arrival, in fixed times."""

_LATENESS = 0.5
"""An arrival may be later than predicted by this share of the fixed time."""

_UNKNOWN_ABSENCE_SECONDS = 1.0
"""Time for which a session that has left once only is remembered; its absence is not known yet."""


@dataclass(slots=True)
class WaitingJob:
    """The properties of a job that the scheduler decides by; see ``jobs.Job``.

    session: None if the job is not batchable. done_tokens: what has run of it.
    """

    key: int
    owner: str
    cost_tokens: int
    session: Hashable | None = None
    is_urgent: bool = False
    done_tokens: int = 0

    @property
    def is_batchable(self) -> bool:
        return self.session is not None

    @property
    def remaining(self) -> int:
        return max(0, self.cost_tokens - self.done_tokens)


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


@dataclass(slots=True)
class SessionArrival:
    """A session that decodes: the last batch it was in, and how long it stays away.

    left_at: end of that batch. absence_seconds: average time from there to its next step; None
    before it has returned once. is_ready: its step waits here.
    """

    batch: int | None = None
    left_at: float = 0.0
    absence_seconds: float | None = None
    is_ready: bool = True

    @property
    def due(self) -> float:
        """When the next step is expected."""
        return self.left_at + (self.absence_seconds or 0.0)


class BatchWindow:
    """The sessions that decode here, and when each is expected next."""

    def __init__(self) -> None:
        self._arrivals: dict[Hashable, SessionArrival] = {}
        self._num_batches = 0
        self._waits_since: float | None = None
        self._last_arrival = 0.0

    def step_ready(self, session: Hashable, now: float) -> None:
        """A decode step of ``session`` is ready to run."""
        arrival = self._arrivals.setdefault(session, SessionArrival())
        arrival.is_ready = True
        self._last_arrival = now
        if arrival.batch is not None:
            absence, average = now - arrival.left_at, arrival.absence_seconds
            arrival.absence_seconds = (
                absence if average is None else average + _ABSENCE_SMOOTHING * (absence - average)
            )

    def batch_done(self, sessions: Iterable[Hashable], now: float) -> None:
        """The steps of ``sessions`` have run in one batch. Sessions not known are ignored."""
        self._num_batches += 1
        for session in sessions:
            arrival = self._arrivals.get(session)
            if arrival is not None:
                arrival.is_ready = False
                arrival.batch, arrival.left_at = self._num_batches, now

    def forget(self, session: Hashable) -> None:
        """``session`` has ended or is in a prefill: do not wait for it."""
        self._arrivals.pop(session, None)

    def wait_seconds(self, num_ready: int, fixed_seconds: float, now: float) -> float:
        """Seconds to wait for an arrival before ``num_ready`` steps run; 0: run them now.

        Call it again after each arrival and when the wait is over.
        """
        began = now if self._waits_since is None else self._waits_since
        until = self._wait_until(began, fixed_seconds, now) if num_ready else now
        self._waits_since = began if until > now else None
        return until - now

    def _wait_until(self, began: float, fixed: float, now: float) -> float:
        ready_batches = {arrival.batch for arrival in self._arrivals.values() if arrival.is_ready}
        until, lateness = now, fixed * _LATENESS
        for session, arrival in list(self._arrivals.items()):
            if arrival.is_ready:
                continue
            average = arrival.absence_seconds
            memory = _UNKNOWN_ABSENCE_SECONDS if average is None else average
            if now > arrival.due + max(memory, lateness):
                # It stayed away twice as long as ever: the session has ended or changed its route.
                del self._arrivals[session]
                continue
            due = max(arrival.due, now)
            until = max(until, self._last_arrival + _GRACE * fixed)
            if arrival.batch in ready_batches and due < began + _PEERS_DUE * fixed:
                until = max(until, began + _PEERS_WAIT * fixed)
            elif average is None or now >= arrival.due + lateness:
                continue
            elif due < now + fixed and due < began + _OTHERS_WAIT * fixed:
                until = max(until, arrival.due + lateness)
        return until


class Scheduler:
    """Waiting jobs, and the rules above. A job waits from ``add`` to ``finish`` or ``discard``.

    ``next_batch`` decides, ``ran`` reports what the batch has really cost.
    """

    def __init__(self, config: SchedulerConfig, cost: BatchCost | None = None) -> None:
        self._config = config
        self.expect(cost or BatchCost())
        self._window = BatchWindow()
        self._jobs: dict[int, WaitingJob] = {}
        self._served: dict[str, int] = {}
        self._batches_since_urgent = _DECODE_MEMORY_BATCHES
        self._batches_since_alone = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that still have to run."""
        return sum(job.remaining for job in self._jobs.values())

    def wait_seconds(self, now: float) -> float | None:
        """How long to wait for more jobs before the next batch; None: no job can run.

        Call it again after each ``add`` and when the wait is over.
        """
        if not self._jobs:
            return None
        # Only decode steps wait: a prefill or a pass keeps the device busy anyway.
        is_urgent = all(job.is_urgent for job in self._jobs.values())
        fixed_seconds = self._batch_cost.fixed_seconds
        return self._window.wait_seconds(len(self._jobs) if is_urgent else 0, fixed_seconds, now)

    def add(self, job: WaitingJob, now: float) -> None:
        """Let ``job`` wait.

        An owner without waiting jobs starts level with the owner that was given least: it neither
        pays for tokens of long ago nor may it claim tokens that it did not ask for then.
        """
        floor = min(self._served.values(), default=0)
        self._served[job.owner] = max(self._served.get(job.owner, 0), floor)
        self._jobs[job.key] = job
        if job.is_urgent:
            self._window.step_ready(job.session, now)
        else:
            self._window.forget(job.session)

    def finish(self, keys: Iterable[int], now: float) -> None:
        """The last parts of these jobs were in one batch, which has just ended."""
        self._window.batch_done([job.session for job in self._remove(keys)], now)

    def discard(self, key: int) -> None:
        """Forget a job that ends early, if it waits."""
        for job in self._remove([key]):
            self._window.forget(job.session)

    def expect(self, cost: BatchCost) -> None:
        """Begin with this estimate of the duration of batches."""
        self._batch_cost = cost
        # Chunks of a pass are measured apart: a token of theirs attends to no cache.
        self._alone_cost = BatchCost(cost.seconds(0), cost.seconds(1) - cost.seconds(0))

    def next_batch(self) -> tuple[Portion, ...]:
        """The portions to run together now; empty if no job waits."""
        if not self._jobs:
            return ()
        alone = self._in_turn(is_batchable=False)
        is_due = self._batches_since_alone >= self._config.forward_every
        if alone and (is_due or len(alone) == len(self._jobs)):
            self._batches_since_alone = 0
            self._batches_since_urgent += 1
            return (Portion(alone[0].key, self._budget_tokens(0, self._alone_cost)),)
        self._batches_since_alone = self._batches_since_alone + 1 if alone else 0
        batchable = self._in_turn(is_batchable=True)
        urgent = _take_whole(
            [job for job in batchable if job.is_urgent], self._config.max_batch_tokens
        )
        self._batches_since_urgent = 0 if urgent else self._batches_since_urgent + 1
        num_urgent = sum(portion.num_tokens for portion in urgent)
        budget_tokens = self._budget_tokens(num_urgent, self._batch_cost)
        rest = [job for job in batchable if not job.is_urgent]
        return (*urgent, *_take_cut(rest, budget_tokens))

    def ran(self, batch: Iterable[Portion], seconds: float) -> None:
        """``batch`` has run: each job did ``num_tokens``, and all together took ``seconds``."""
        num_tokens, is_batchable = 0, True
        for portion in batch:
            job = self._jobs[portion.key]
            job.done_tokens += portion.num_tokens
            self._served[job.owner] += portion.num_tokens
            num_tokens += portion.num_tokens
            is_batchable = job.is_batchable
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

    def _in_turn(self, *, is_batchable: bool) -> list[WaitingJob]:
        """Jobs by what their owner was given, then by what they were given themselves, then by age.

        The second key lets the prefills of one owner take turns. A job that is not batchable keeps
        its turn until it is done: it holds memory for activations, which turns would multiply.
        """
        return sorted(
            (job for job in self._jobs.values() if job.is_batchable is is_batchable),
            key=lambda job: (self._served[job.owner], job.done_tokens if is_batchable else 0),
        )

    def _remove(self, keys: Iterable[int]) -> list[WaitingJob]:
        removed = [self._jobs.pop(key) for key in keys if key in self._jobs]
        owners = {job.owner for job in self._jobs.values()}
        self._served = {o: served for o, served in self._served.items() if o in owners}
        return removed


def _take_whole(jobs: Sequence[WaitingJob], budget_tokens: int) -> list[Portion]:
    """The first jobs as a whole, as long as the budget lasts.

    The very first is cut if no batch could hold it; else it would wait for ever.
    """
    taken: list[Portion] = []
    for job in jobs:
        num_tokens = min(job.remaining, budget_tokens)
        if taken and num_tokens < job.remaining:
            break
        taken.append(Portion(job.key, num_tokens))
        budget_tokens -= num_tokens
    return taken


def _take_cut(jobs: Sequence[WaitingJob], budget_tokens: int) -> list[Portion]:
    """The first jobs, the last of them cut to what is left of the budget."""
    taken: list[Portion] = []
    for job in jobs:
        num_tokens = min(job.remaining, budget_tokens)
        if num_tokens == 0 and job.remaining:
            break
        taken.append(Portion(job.key, num_tokens))
        budget_tokens -= num_tokens
    return taken
