"""When a server that still answers is left behind for a faster one.

Compares what steps took with what servers promise; forgets nothing it has moved for a while. Knows
no network: times and promises come in as values.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from petals.client.trace import StepTiming
from petals.types import BlockSpan

STEPS = 3
"""So many steps in a row must have been slow."""

FACTOR = 2.0
LOOK_SECONDS = 1.0
"""So often a range of blocks is looked at."""

REST_SECONDS = 60.0
"""A range of blocks that was moved is not moved again within so long."""

MAX_TOKENS = 16
"""Longer steps are not compared: they take long everywhere."""

Promise = Callable[[], float | None]
"""Seconds for one token, as far as they are known."""


class StragglerDetector:
    """The judge of one session's hops."""

    def __init__(self) -> None:
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
        if len(timings) < STEPS or now < self._look_at.get(blocks, now):
            return False
        latest = list(islice(reversed(timings), STEPS))
        if max(step.num_tokens for step in latest) > MAX_TOKENS:
            return False
        self._look_at[blocks] = now + LOOK_SECONDS
        per_token = min(
            (step.queue_seconds + step.compute_seconds) / max(1, step.num_tokens) for step in latest
        )
        for promise in expected_seconds:
            seconds = promise()
            if seconds is None or per_token < FACTOR * seconds:
                return False
        self._look_at[blocks] = now + REST_SECONDS
        return True
