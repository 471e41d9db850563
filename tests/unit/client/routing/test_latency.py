"""How long a client waits for a step."""

import pytest

from petals.client.routing.latency import LatencyEstimate, StepTimeouts, redial_seconds
from petals.swarm.failover_config import FailoverConfig

CONFIG = FailoverConfig()


def test_nothing_is_known_at_first() -> None:
    assert LatencyEstimate().expected_seconds(1) is None


def test_the_median() -> None:
    pace = LatencyEstimate()
    for seconds in (0.1, 0.2, 9.0):
        pace.note(1, seconds)
    assert pace.expected_seconds(1) == pytest.approx(0.2)


def test_longer_steps_take_longer_and_shorter_ones_as_long() -> None:
    pace = LatencyEstimate()
    pace.note(100, 2.0)
    assert pace.expected_seconds(300) == pytest.approx(6.0)
    assert pace.expected_seconds(1) == pytest.approx(2.0)


def test_old_steps_are_forgotten() -> None:
    pace = LatencyEstimate()
    pace.note(1, 100.0)
    for _ in range(40):
        pace.note(1, 1.0)
    assert pace.expected_seconds(1) == pytest.approx(1.0)


def test_a_step_of_an_unmeasured_route() -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    timeouts.begin(256)
    assert timeouts.seconds() == pytest.approx(30.0)
    timeouts.note_progress(64, 0.5)
    assert timeouts.seconds() == pytest.approx(4 * 0.5 * 256 / 64)


def test_a_step_of_a_measured_route() -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    for seconds in (0.1, 2.0, 2.0):
        timeouts.begin(1)
        timeouts.end(seconds)
    assert timeouts.seconds() == pytest.approx(8.0)
    assert timeouts.seconds(3) == pytest.approx(24.0)
    assert timeouts.hung_seconds() == pytest.approx(32.0)


def test_a_quick_route_has_the_shortest_timeout() -> None:
    timeouts = StepTimeouts(CONFIG, 1.0)
    timeouts.begin(1)
    timeouts.end(0.01)
    assert timeouts.seconds() == 1.0
    assert timeouts.hung_seconds() == 10.0


@pytest.mark.parametrize(
    ("link_seconds", "seconds"), [(0.0, 0.3), (0.005, 0.3), (0.06, 0.6), (0.5, 1.0)]
)
def test_a_redial_may_take_some_trips(link_seconds: float, seconds: float) -> None:
    assert redial_seconds(link_seconds, CONFIG) == pytest.approx(seconds)
