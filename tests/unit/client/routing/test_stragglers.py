"""Which servers are left for being slow."""

import pytest

from petals.client.routing.stragglers import StragglerDetector
from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan

SPAN = BlockSpan(0, 4)
CONFIG = FailoverConfig()
SLOW = (0.9, 0.9, 0.9)


def should_leave(
    detector: StragglerDetector,
    seconds: tuple[float, ...] = SLOW,
    estimates: tuple[float | None, float | None] = (0.1, 0.1),
    *,
    num_tokens: int = 1,
    now: float = 0.0,
    blocks: BlockSpan = SPAN,
) -> bool:
    """``seconds`` of each step; ``estimates`` for one token by this server and by the other."""
    timings = [StepTiming(n, num_tokens, s, 0.0, s, num_tokens) for n, s in enumerate(seconds)]
    own, other = estimates
    return detector.should_leave(blocks, timings, (lambda: own, lambda: other), now)


@pytest.mark.parametrize(
    ("seconds", "own", "other", "num_tokens", "left"),
    [
        ((0.1, 0.2, 0.2, 0.2), 0.1, 0.1, 1, True),
        ((0.9, 0.9), 0.1, 0.1, 1, False),  # too few steps
        ((0.9, 0.9, 0.19), 0.1, 0.1, 1, False),  # a step below the factor of 2
        (SLOW, 0.5, 0.1, 1, False),  # as slow as announced
        (SLOW, 0.1, 0.5, 1, False),  # the other server is slow, too
        (SLOW, 0.1, None, 1, False),
        (SLOW, None, 0.1, 1, False),
        (SLOW, 0.1, 0.1, 8, False),  # per token it is quick
        ((90.0, 90.0, 90.0), 0.1, 0.1, 17, False),  # steps too long to be compared
    ],
)
def test_a_straggler_is_slower_than_it_and_another_server_announce(
    seconds: tuple[float, ...],
    own: float | None,
    other: float | None,
    num_tokens: int,
    left: bool,
) -> None:
    detector = StragglerDetector(CONFIG)
    assert should_leave(detector, seconds, (own, other), num_tokens=num_tokens) is left


def test_blocks_rest_after_a_move_and_between_looks() -> None:
    detector = StragglerDetector(CONFIG)
    look, rest = CONFIG.straggler_look_seconds, CONFIG.straggler_rest_seconds
    assert not should_leave(detector, estimates=(0.1, 0.8))
    assert not should_leave(detector, now=look / 2)
    assert should_leave(detector, now=look)
    assert not should_leave(detector, now=look + rest - 1)
    assert should_leave(detector, now=look, blocks=BlockSpan(4, 8))
    assert should_leave(detector, now=look + rest)
