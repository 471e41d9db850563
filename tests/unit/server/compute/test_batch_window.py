"""When to wait for company, in numbers."""

import pytest

from petals.server.compute.batch_window import BatchWindow

FIXED = 0.012
GRACE = 0.15 * FIXED
LATENESS = FIXED / 2


def regulars(*away: float) -> BatchWindow:
    """Sessions 0, 1, ... that were answered at time 0, each alone, and stay away so long."""
    gathering = BatchWindow()
    for session, seconds in enumerate(away):
        gathering.arrived(session, -2 * seconds)
        gathering.answered([session], -seconds)
        gathering.arrived(session, 0.0)
        gathering.answered([session], 0.0)
    return gathering


def companions(*away: float) -> BatchWindow:
    """The same, but their last steps ran as one batch."""
    gathering = regulars(*away)
    for session in range(len(away)):
        gathering.arrived(session, 0.0)
    gathering.answered(range(len(away)), 0.0)
    return gathering


def test_a_session_alone_never_waits() -> None:
    gathering = regulars(0.050)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == 0


def test_one_waits_for_another_that_is_nearly_here() -> None:
    gathering = regulars(0.050, 0.060)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == pytest.approx(0.010 + LATENESS)
    gathering.arrived(1, 0.060)
    assert gathering.patience(2, FIXED, 0.060) == 0


@pytest.mark.parametrize(("due_in", "waits"), [(0.001, True), (0.011, True), (0.013, False)])
def test_one_who_is_due_within_a_fixed_time_is_worth_it(due_in: float, waits: bool) -> None:
    gathering = regulars(0.050, 0.050 + due_in)
    gathering.arrived(0, 0.050 - GRACE)
    assert (gathering.patience(1, FIXED, 0.050) > 0) is waits


def test_who_does_not_come_is_not_waited_for_again() -> None:
    gathering = regulars(0.050, 0.055)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) > 0
    assert gathering.patience(1, FIXED, 0.055 + LATENESS) == 0
    assert gathering.patience(1, FIXED, 0.051 + 2 * FIXED) == 0


def test_others_may_follow_an_arrival_at_once() -> None:
    gathering = regulars(0.050, 0.150)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == pytest.approx(GRACE)
    assert gathering.patience(1, FIXED, 0.050 + GRACE) == 0


def test_those_who_left_together_are_waited_for() -> None:
    gathering = companions(0.050, 0.070, 0.070)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == pytest.approx(1.5 * FIXED)
    gathering.arrived(1, 0.055)
    assert gathering.patience(2, FIXED, 0.055) == pytest.approx(1.5 * FIXED - 0.005)
    gathering.arrived(2, 0.056)
    assert gathering.patience(3, FIXED, 0.056) == 0


def test_a_companion_that_does_not_come_is_left_behind() -> None:
    gathering = companions(0.050, 0.050)
    gathering.arrived(0, 0.050)
    wait = gathering.patience(1, FIXED, 0.050)
    assert gathering.patience(1, FIXED, 0.050 + wait) == 0
    gathering.answered([0], 0.080)
    gathering.arrived(1, 0.100)
    gathering.answered([1], 0.110)
    gathering.arrived(0, 0.130)
    assert gathering.patience(1, FIXED, 0.130 + GRACE) == 0


def test_a_companion_with_a_longer_way_is_not_waited_for() -> None:
    gathering = companions(0.050, 0.200)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == pytest.approx(GRACE)


def test_newcomers_are_companions_too_but_not_for_long() -> None:
    gathering = BatchWindow()
    for session in (0, 1):
        gathering.arrived(session, 0.0)
    gathering.answered([0, 1], 0.0)
    gathering.arrived(0, 0.030)
    assert gathering.patience(1, FIXED, 0.030) == pytest.approx(1.5 * FIXED)
    gathering.answered([0], 0.050)
    gathering.arrived(0, 1.1)
    assert gathering.patience(1, FIXED, 1.1) == 0


def test_a_stream_of_newcomers_holds_a_step_for_two_fixed_times_at_most() -> None:
    gathering = regulars(*(0.050 + 0.002 * index for index in range(20)))
    gathering.arrived(0, 0.050)
    now = 0.050
    while gathering.patience(1, FIXED, now) > 0:
        now += 0.002
    assert FIXED < now - 0.050 <= 2 * FIXED + LATENESS + 0.002


def test_an_ended_session_is_forgotten() -> None:
    gathering = regulars(0.050, 0.052)
    gathering.forget(1)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == 0
