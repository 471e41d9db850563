"""How long the steps of a route take: how long a client waits for one, and which hop is too slow.

Plain arithmetic; knows no clock and no servers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from statistics import median

from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig

_REMEMBERED = 32
"""Number of latest steps whose durations are kept."""


def redial_seconds(link_seconds: float, config: FailoverConfig) -> float:
    """Time (s) for a peer whose stream broke to accept a new one; ``link_seconds``: one way to it.

    A peer that died refuses at once, or does not answer at all: the session stands still meanwhile.
    """
    seconds = config.redial_trips * link_seconds
    return min(config.redial_max_seconds, max(config.redial_min_seconds, seconds))


class LatencyEstimate:
    """The latest durations: (tokens, seconds)."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of ``num_tokens`` took ``seconds``."""
        self._steps.append((num_tokens, seconds))

    def expected_seconds(self, num_tokens: int) -> float | None:
        """Median over the latest steps; None before the first.

        A step that is longer than a measured one takes longer in proportion, a shorter one as long.
        """
        if not self._steps:
            return None
        return median(
            seconds * max(1.0, num_tokens / max(1, measured)) for measured, seconds in self._steps
        )


class StepTimeouts:
    """How long to wait for a step of one session's route. ``shortest``: seconds, at least."""

    def __init__(self, config: FailoverConfig, shortest: float) -> None:
        self._config = config
        self._shortest = shortest
        self._steps = LatencyEstimate()
        self._pieces = LatencyEstimate()
        self._num_tokens = 0
        self._num_timeouts = 0
        """Timeouts since the last step that came to its end."""

    def begin(self, num_tokens: int) -> None:
        """A step of ``num_tokens``, in one piece or in several, begins."""
        self._num_tokens, self._pieces = num_tokens, LatencyEstimate()

    def note_progress(self, num_tokens: int, seconds: float) -> None:
        """The pieces that are done have ``num_tokens`` and took ``seconds`` since the beginning."""
        self._pieces.note(num_tokens, seconds)

    def end(self, seconds: float) -> None:
        """The step that was begun last took ``seconds``. After a timeout older durations count no
        more: the route, or the load of its servers, is another one.
        """
        if self._num_timeouts:
            self._steps, self._num_timeouts = LatencyEstimate(), 0
        self._steps.note(self._num_tokens, seconds)

    def note_timeout(self) -> None:
        """No hop has answered in time."""
        self._num_timeouts += 1

    def seconds(self, num_tokens: int | None = None) -> float:
        """How long to wait for ``num_tokens`` (None: those of the step under way).

        After n timeouts in a row, n + 1 times as long: a route that has become slower than any
        measured step would otherwise never bring one to its end.
        """
        return (1 + self._num_timeouts) * self._single_timeout(num_tokens)

    def hung_seconds(self) -> float:
        """When a hop that answers pings, but not the step under way, is abandoned."""
        seconds = self._config.hung_factor * self._single_timeout()
        return max(self._config.hung_seconds, seconds)

    def _single_timeout(self, num_tokens: int | None = None) -> float:
        config, tokens = self._config, self._num_tokens if num_tokens is None else num_tokens
        expected = self._steps.expected_seconds(tokens)
        if expected is None:
            expected = self._pieces.expected_seconds(tokens)
        if expected is not None:
            return max(self._shortest, config.timeout_factor * expected)
        return self._shortest * config.unmeasured_factor * (1 + tokens / config.unmeasured_tokens)


def is_straggler(
    timings: Sequence[StepTiming],
    expected_seconds: Iterable[Callable[[], float | None]],
    config: FailoverConfig,
) -> bool:
    """Whether a hop with these timings answers, but much more slowly than another server would.

    True if each of its latest ``straggler_steps`` steps took at least ``straggler_factor`` times
    the time per token that this server announces, and as many times what the alternative announces.
    ``expected_seconds`` computes these two, which is costly; None: unknown. The first condition
    prevents a move if all servers announce times that are too short: the alternative would be as
    slow.
    """
    latest = list(islice(reversed(timings), config.straggler_steps))
    if len(latest) < config.straggler_steps:
        return False
    if max(step.num_tokens for step in latest) > config.straggler_max_tokens:
        return False
    per_token = min(
        (step.queue_seconds + step.compute_seconds) / max(1, step.num_tokens) for step in latest
    )
    announced = (estimate() for estimate in expected_seconds)
    return all(
        seconds is not None and per_token >= config.straggler_factor * seconds
        for seconds in announced
    )
