"""Detects stragglers: servers that answer, but much more slowly than another server would.

Compares the measured time of steps with the times that servers announce. Pure: times are arguments.
Knows no network.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from petals.client.trace import StepTiming
from petals.types import BlockSpan

STEPS = 3
"""Number of latest steps that must all have been slow."""

FACTOR = 2.0
"""A step is slow if it took at least FACTOR times the expected seconds per token."""

LOOK_SECONDS = 1.0
"""Time (s) between two comparisons of the same blocks: the expected times are costly to compute."""

REST_SECONDS = 60.0
"""Time (s) for which blocks are not compared again after they were moved to another server. It
prevents a session from moving back and forth between two servers that are both slow.
"""

MAX_TOKENS = 16
"""Tokens of a step above which it is not compared: the time per token of a prefill differs from
that of decoding, which servers announce.
"""

SecondsEstimate = Callable[[], float | None]
"""Computes the expected seconds for one token; None if they are unknown."""


class StragglerDetector:
    """Decides for one session which of its hops are stragglers."""

    def __init__(self) -> None:
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

        True if each of the latest ``STEPS`` steps took at least ``FACTOR`` times what this server
        announces, and ``FACTOR`` times what the alternative announces. ``expected_seconds`` are
        these two estimates, per token. The first condition prevents a move if all servers announce
        times that are too short: the alternative would be as slow.
        """
        if len(timings) < STEPS or now < self._next_look.get(blocks, now):
            return False
        latest = list(islice(reversed(timings), STEPS))
        if max(step.num_tokens for step in latest) > MAX_TOKENS:
            return False
        self._next_look[blocks] = now + LOOK_SECONDS
        per_token = min(
            (step.queue_seconds + step.compute_seconds) / max(1, step.num_tokens) for step in latest
        )
        for estimate in expected_seconds:
            seconds = estimate()
            if seconds is None or per_token < FACTOR * seconds:
                return False
        self._next_look[blocks] = now + REST_SECONDS
        return True
