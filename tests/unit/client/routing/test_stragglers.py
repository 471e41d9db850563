"""Who is left behind for being slow."""

import pytest

from petals.client.routing.stragglers import StragglerDetector
from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan

SPAN = BlockSpan(0, 4)
CONFIG = FailoverConfig()
LOOK_SECONDS, REST_SECONDS = CONFIG.straggler_look_seconds, CONFIG.straggler_rest_seconds


def steps(*seconds: float, num_tokens: int = 1) -> list[StepTiming]:
    return [
        StepTiming(number, num_tokens, taken, 0.0, taken, num_tokens)
        for number, taken in enumerate(seconds)
    ]


def is_left(timings: list[StepTiming], own: float | None, other: float | None) -> bool:
    return StragglerDetector(CONFIG).should_leave(SPAN, timings, (lambda: own, lambda: other), 0.0)


def test_three_steps_of_twice_the_time() -> None:
    assert is_left(steps(0.1, 0.2, 0.2, 0.2), 0.1, 0.1)


@pytest.mark.parametrize(
    ("timings", "own", "other"),
    [
        (steps(0.9, 0.9), 0.1, 0.1),
        (steps(0.9, 0.9, 0.19), 0.1, 0.1),
        (steps(0.9, 0.9, 0.9), 0.5, 0.1),
        (steps(0.9, 0.9, 0.9), 0.1, 0.5),
        (steps(0.9, 0.9, 0.9), 0.1, None),
        (steps(0.9, 0.9, 0.9), None, 0.1),
        (steps(0.9, 0.9, 0.9, num_tokens=8), 0.1, 0.1),
        (steps(90.0, 90.0, 90.0, num_tokens=17), 0.1, 0.1),
    ],
)
def test_nobody_else_is_left(timings: list[StepTiming], own: float, other: float) -> None:
    assert not is_left(timings, own, other)


def test_a_range_rests_after_a_move_and_between_looks() -> None:
    judge, slow = StragglerDetector(CONFIG), steps(0.9, 0.9, 0.9)
    promises, unmoved = (lambda: 0.1, lambda: 0.1), (lambda: 0.1, lambda: 0.8)
    assert not judge.should_leave(SPAN, slow, unmoved, 0.0)
    assert not judge.should_leave(SPAN, slow, promises, LOOK_SECONDS / 2)
    assert judge.should_leave(SPAN, slow, promises, LOOK_SECONDS)
    assert not judge.should_leave(SPAN, slow, promises, LOOK_SECONDS + REST_SECONDS - 1)
    assert judge.should_leave(BlockSpan(4, 8), slow, promises, LOOK_SECONDS)
    assert judge.should_leave(SPAN, slow, promises, LOOK_SECONDS + REST_SECONDS)
