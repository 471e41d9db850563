"""How long a batch waits for further decode steps, in numbers."""

import pytest

from petals.server.compute.scheduler import BatchWindow

FIXED = 0.012
GRACE = 0.15 * FIXED
LATENESS = FIXED / 2


def regulars(*absence: float) -> BatchWindow:
    """Sessions 0, 1, ... that each left at time 0 in a batch of its own, and stay away so long."""
    window = BatchWindow()
    for session, seconds in enumerate(absence):
        window.step_ready(session, -2 * seconds)
        window.batch_done([session], -seconds)
        window.step_ready(session, 0.0)
        window.batch_done([session], 0.0)
    return window


def batch_peers(*absence: float) -> BatchWindow:
    """The same, but their last steps ran as one batch."""
    window = regulars(*absence)
    for session in range(len(absence)):
        window.step_ready(session, 0.0)
    window.batch_done(range(len(absence)), 0.0)
    return window


def test_a_session_alone_never_waits() -> None:
    window = regulars(0.050)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == 0


def test_one_waits_for_another_that_is_nearly_here() -> None:
    window = regulars(0.050, 0.060)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == pytest.approx(0.010 + LATENESS)
    window.step_ready(1, 0.060)
    assert window.wait_seconds(2, FIXED, 0.060) == 0


@pytest.mark.parametrize(("due_in", "waits"), [(0.001, True), (0.011, True), (0.013, False)])
def test_a_session_is_waited_for_if_due_within_a_fixed_time(due_in: float, waits: bool) -> None:
    window = regulars(0.050, 0.050 + due_in)
    window.step_ready(0, 0.050 - GRACE)
    assert (window.wait_seconds(1, FIXED, 0.050) > 0) is waits


def test_a_session_that_does_not_come_is_not_waited_for_again() -> None:
    window = regulars(0.050, 0.055)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) > 0
    assert window.wait_seconds(1, FIXED, 0.055 + LATENESS) == 0
    assert window.wait_seconds(1, FIXED, 0.051 + 2 * FIXED) == 0


def test_another_may_follow_an_arrival_at_once() -> None:
    window = regulars(0.050, 0.150)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == pytest.approx(GRACE)
    assert window.wait_seconds(1, FIXED, 0.050 + GRACE) == 0


def test_batch_peers_are_waited_for() -> None:
    window = batch_peers(0.050, 0.070, 0.070)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == pytest.approx(1.5 * FIXED)
    window.step_ready(1, 0.055)
    assert window.wait_seconds(2, FIXED, 0.055) == pytest.approx(1.5 * FIXED - 0.005)
    window.step_ready(2, 0.056)
    assert window.wait_seconds(3, FIXED, 0.056) == 0


def test_a_batch_peer_that_does_not_come_is_left_behind() -> None:
    window = batch_peers(0.050, 0.050)
    window.step_ready(0, 0.050)
    wait = window.wait_seconds(1, FIXED, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050 + wait) == 0
    window.batch_done([0], 0.080)
    window.step_ready(1, 0.100)
    window.batch_done([1], 0.110)
    window.step_ready(0, 0.130)
    assert window.wait_seconds(1, FIXED, 0.130 + GRACE) == 0


def test_a_batch_peer_with_a_longer_route_is_not_waited_for() -> None:
    window = batch_peers(0.050, 0.200)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == pytest.approx(GRACE)


def test_new_sessions_are_batch_peers_too_but_not_for_long() -> None:
    window = BatchWindow()
    for session in (0, 1):
        window.step_ready(session, 0.0)
    window.batch_done([0, 1], 0.0)
    window.step_ready(0, 0.030)
    assert window.wait_seconds(1, FIXED, 0.030) == pytest.approx(1.5 * FIXED)
    window.batch_done([0], 0.050)
    window.step_ready(0, 1.1)
    assert window.wait_seconds(1, FIXED, 1.1) == 0


def test_a_stream_of_arrivals_holds_a_step_for_two_fixed_times_at_most() -> None:
    window = regulars(*(0.050 + 0.002 * index for index in range(20)))
    window.step_ready(0, 0.050)
    now = 0.050
    while window.wait_seconds(1, FIXED, now) > 0:
        now += 0.002
    assert FIXED < now - 0.050 <= 2 * FIXED + LATENESS + 0.002


def test_an_ended_session_is_forgotten() -> None:
    window = regulars(0.050, 0.052)
    window.forget(1)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == 0
