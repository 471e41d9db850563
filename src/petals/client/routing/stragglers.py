"""When a server that still answers is left behind for a faster one.

Compares what steps took with what servers promise; forgets nothing it has moved for a while. Knows
no network: times and promises come in as values.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan

Promise = Callable[[], float | None]
"""Seconds for one token, as far as they are known."""


class StragglerDetector:
    """The judge of one session's hops."""

    def __init__(self, config: FailoverConfig) -> None:
        self._config = config
        self._look_at: dict[BlockSpan, float] = {}
        """When a range may be looked at again."""

    def should_leave(
        self,
        blocks: BlockSpan,
        timings: Sequence[StepTiming],
        expected_seconds: tuple[Promise, Promise],
        now: float,
    ) -> bool:
        """True if the latest steps all took twice what another server would take.

        And twice what this server itself announces: ``expected_seconds`` are (this server's, the
        alternative's). Where every server announces too much, none is a straggler.
        """
        config = self._config
        if len(timings) < config.straggler_steps or now < self._look_at.get(blocks, now):
            return False
        latest = list(islice(reversed(timings), config.straggler_steps))
        if max(step.num_tokens for step in latest) > config.straggler_max_tokens:
            return False
        self._look_at[blocks] = now + config.straggler_look_seconds
        per_token = min(
            (step.queue_seconds + step.compute_seconds) / max(1, step.num_tokens) for step in latest
        )
        for promise in expected_seconds:
            seconds = promise()
            if seconds is None or per_token < config.straggler_factor * seconds:
                return False
        self._look_at[blocks] = now + config.straggler_rest_seconds
        return True
