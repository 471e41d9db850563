"""Detects stragglers: servers that answer, but much more slowly than another server would.

Compares the measured time of steps with the times that servers announce. Pure: times are arguments.
Knows no network.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan

SecondsEstimate = Callable[[], float | None]
"""Computes the expected seconds for one token; None if they are unknown."""


class StragglerDetector:
    """Decides for one session which of its hops are stragglers."""

    def __init__(self, config: FailoverConfig) -> None:
        self._config = config
        self._next_look: dict[BlockSpan, float] = {}
        """Blocks -> monotonic seconds from which on they may be compared again."""

    def should_leave(
        self,
        blocks: BlockSpan,
        timings: Sequence[StepTiming],
        expected_seconds: tuple[SecondsEstimate, SecondsEstimate],
        now: float,
    ) -> bool:
        """Whether the hop that runs ``blocks`` should be replaced at ``now``.

        True if each of the latest ``straggler_steps`` steps took at least ``straggler_factor``
        times what this server announces, and the same factor times what the alternative announces.
        ``expected_seconds`` are these two estimates, per token. The first condition prevents a move
        if all servers announce times that are too short: the alternative would be as slow.
        """
        config = self._config
        if len(timings) < config.straggler_steps or now < self._next_look.get(blocks, now):
            return False
        latest = list(islice(reversed(timings), config.straggler_steps))
        if max(step.num_tokens for step in latest) > config.straggler_max_tokens:
            return False
        # The expected times are costly to compute.
        self._next_look[blocks] = now + config.straggler_look_seconds
        per_token = min(
            (step.queue_seconds + step.compute_seconds) / max(1, step.num_tokens) for step in latest
        )
        for estimate in expected_seconds:
            seconds = estimate()
            if seconds is None or per_token < config.straggler_factor * seconds:
                return False
        # Without a rest a session would move back and forth between two slow servers.
        self._next_look[blocks] = now + config.straggler_rest_seconds
        return True
