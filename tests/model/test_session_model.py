"""The real session core of both ends in virtual time, under drawn schedules of steps and faults.

`play` fails if an output is not the reference's, if a step does not end in time, if an invariant of
an idle session is broken, or if a reservation is left behind.
"""

from hypothesis import HealthCheck, given, settings

from support.simulation.play import Schedule, play

from .schedules import ALL_KINDS, REALISTIC, schedules

NUM_EXAMPLES = 300
QUICK = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(schedules(REALISTIC, max_rounds=6))
def test_faults_that_happen(schedule: Schedule) -> None:
    play(schedule)


@QUICK
@given(schedules(ALL_KINDS, max_rounds=6))
def test_messages_that_are_lost_repeated_and_overtaken(schedule: Schedule) -> None:
    play(schedule)
