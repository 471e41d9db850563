"""When to wait for company, in numbers."""

import pytest

from petals.server.gathering import Gathering

FIXED = 0.012


def regulars(*away: float) -> Gathering:
    """Sessions 0, 1, ... that were answered at time 0 and stay away so long each time."""
    gathering = Gathering()
    for session, seconds in enumerate(away):
        gathering.arrived(session, -2 * seconds)
        gathering.answered(session, -seconds)
        gathering.arrived(session, 0.0)
        gathering.answered(session, 0.0)
    return gathering


def test_a_session_alone_never_waits() -> None:
    gathering = regulars(0.050)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == 0


def test_one_waits_for_another_that_is_nearly_here() -> None:
    gathering = regulars(0.050, 0.060)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == pytest.approx(0.010 + FIXED / 4)
    gathering.arrived(1, 0.060)
    assert gathering.patience(2, FIXED, 0.060) == 0


@pytest.mark.parametrize(("due_in", "waits"), [(0.001, True), (0.011, True), (0.013, False)])
def test_one_who_is_due_within_a_fixed_time_is_worth_it(due_in: float, waits: bool) -> None:
    gathering = regulars(0.050 + due_in)
    assert (gathering.patience(3, FIXED, 0.050) > 0) is waits


def test_who_does_not_come_is_not_waited_for_again() -> None:
    gathering = regulars(0.050, 0.055)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) > 0
    assert gathering.patience(1, FIXED, 0.055 + FIXED / 4) == 0
    assert gathering.patience(1, FIXED, 0.051 + 2 * FIXED) == 0


def test_a_stream_of_newcomers_holds_a_step_for_two_fixed_times_at_most() -> None:
    gathering = regulars(*(0.050 + 0.002 * index for index in range(20)))
    gathering.arrived(0, 0.050)
    now = 0.050
    while gathering.patience(1, FIXED, now) > 0:
        now += 0.002
    assert FIXED < now - 0.050 <= 2 * FIXED + 0.002


def test_an_ended_session_is_forgotten() -> None:
    gathering = regulars(0.050, 0.052)
    gathering.forget(1)
    gathering.arrived(0, 0.050)
    assert gathering.patience(1, FIXED, 0.050) == 0
