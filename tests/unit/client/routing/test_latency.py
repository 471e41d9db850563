"""How long a client waits for a step, and which hop is left for being slow."""

import pytest

from petals.client.routing.latency import (
    LatencyEstimate,
    StepTimeouts,
    is_straggler,
    redial_seconds,
)
from petals.client.trace import StepTiming
from petals.swarm.failover_config import FailoverConfig

CONFIG = FailoverConfig()


@pytest.mark.parametrize(
    ("measured", "num_tokens", "seconds"),
    [
        ([(1, 0.1), (1, 0.2), (1, 9.0)], 1, 0.2),  # the median
        ([(100, 2.0)], 300, 6.0),  # a longer step takes longer in proportion,
        ([(100, 2.0)], 1, 2.0),  # a shorter one as long
        ([(1, 100.0)] + [(1, 1.0)] * 40, 1, 1.0),  # only the latest steps count
    ],
)
def test_the_expected_time_of_a_step(
    measured: list[tuple[int, float]], num_tokens: int, seconds: float
) -> None:
    estimate = LatencyEstimate()
    assert estimate.expected_seconds(num_tokens) is None
    for step in measured:
        estimate.note(*step)
    assert estimate.expected_seconds(num_tokens) == pytest.approx(seconds)


def test_the_timeout_before_a_step_was_measured() -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    timeouts.begin(256)
    assert timeouts.seconds() == pytest.approx(30.0)
    timeouts.note_progress(64, 0.5)
    assert timeouts.seconds() == pytest.approx(4 * 0.5 * 256 / 64)


def test_a_route_that_has_become_slower_gets_more_time() -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    timeouts.begin(1)
    timeouts.end(0.5)
    for num_timeouts in range(3):
        assert timeouts.seconds() == pytest.approx((1 + num_timeouts) * 4 * 0.5)
        assert timeouts.hung_seconds() == pytest.approx(10.0)
        timeouts.note_timeout()
    timeouts.end(3.0)  # older durations count no more
    assert timeouts.seconds() == pytest.approx(4 * 3.0)


@pytest.mark.parametrize(
    ("measured", "one_token", "three_tokens", "hung"),
    [([0.1, 2.0, 2.0], 8.0, 24.0, 32.0), ([0.01], 1.0, 1.0, 10.0)],
    ids=["factor", "minimum"],
)
def test_the_timeout_of_a_measured_route(
    measured: list[float], one_token: float, three_tokens: float, hung: float
) -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    for seconds in measured:
        timeouts.begin(1)
        timeouts.end(seconds)
    found = timeouts.seconds(), timeouts.seconds(3), timeouts.hung_seconds()
    assert found == pytest.approx((one_token, three_tokens, hung))


@pytest.mark.parametrize(
    ("link_seconds", "seconds"), [(0.0, 0.3), (0.005, 0.3), (0.06, 0.6), (0.5, 1.0)]
)
def test_the_timeout_of_a_redial(link_seconds: float, seconds: float) -> None:
    assert redial_seconds(link_seconds, CONFIG) == pytest.approx(seconds)


SLOW = (0.9, 0.9, 0.9)


@pytest.mark.parametrize(
    ("seconds", "own", "other", "num_tokens", "is_slow"),
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
    is_slow: bool,
) -> None:
    """``seconds`` of each step; ``own``, ``other``: announced for one token."""
    timings = [StepTiming(n, num_tokens, s, 0.0, s, num_tokens) for n, s in enumerate(seconds)]
    assert is_straggler(timings, (lambda: own, lambda: other), CONFIG) is is_slow
