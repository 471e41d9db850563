"""How long silence means nothing."""

import pytest

from petals.client.session.latency import LatencyEstimate, redial_seconds


def test_nothing_is_known_at_first() -> None:
    assert LatencyEstimate().timeout_seconds(1) is None


def test_four_times_the_median() -> None:
    pace = LatencyEstimate()
    for seconds in (0.1, 0.2, 9.0):
        pace.note(1, seconds)
    assert pace.timeout_seconds(1) == pytest.approx(0.8)


def test_longer_steps_take_longer_and_shorter_ones_as_long() -> None:
    pace = LatencyEstimate()
    pace.note(100, 2.0)
    assert pace.timeout_seconds(300) == pytest.approx(24.0)
    assert pace.timeout_seconds(1) == pytest.approx(8.0)


def test_old_steps_are_forgotten() -> None:
    pace = LatencyEstimate()
    pace.note(1, 100.0)
    for _ in range(40):
        pace.note(1, 1.0)
    assert pace.timeout_seconds(1) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("link_seconds", "seconds"), [(0.0, 0.3), (0.005, 0.3), (0.06, 0.6), (0.5, 1.0)]
)
def test_a_redial_may_take_some_trips(link_seconds: float, seconds: float) -> None:
    assert redial_seconds(link_seconds) == pytest.approx(seconds)
