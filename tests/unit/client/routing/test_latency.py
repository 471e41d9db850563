"""How long a client waits for a step."""

import pytest

from petals.client.routing.latency import LatencyEstimate, StepTimeouts, redial_seconds
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
