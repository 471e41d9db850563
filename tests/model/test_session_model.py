"""The real session core of both ends in virtual time, under schedules of steps and faults.

`play` fails if an output is not the reference's, if a step does not end in time, if an invariant of
an idle session is broken, or if a reservation is left behind. ``make model-check`` plays more.
"""

import pytest

from support.simulation.faults import Fault, FaultKind
from support.simulation.play import play
from support.simulation.schedule import Schedule, Setting, Turn

from .schedules import ALL_KINDS, at_every_message, draw

NUM_DRAWN = 400
NUM_PARTS = 4


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_drawn_schedules(part: int) -> None:
    for number in range(part, NUM_DRAWN, NUM_PARTS):
        play(draw(number))


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name.lower())
def test_one_fault_at_every_message(kind: FaultKind) -> None:
    for schedule in at_every_message(lambda at: (Fault(kind, at, who=1 + at % 2, seconds=0.7),)):
        play(schedule)


def test_a_route_that_is_slower_than_any_step_before() -> None:
    """Two servers drain, and the last route has links of 0.4 s where steps took 0.06 s; the servers
    keep no outputs, so a step that is repeated too early cannot be answered.
    """
    drains = [
        Fault(FaultKind.DRAIN, at, who, seconds=seconds)
        for at, who, seconds in ((1, 2, 1.5), (8, 4, 0.02), (6, 2, 1.5))
    ]
    repeats = [
        Fault(FaultKind.REPEAT, 0, who=5, seconds=0.7),
        Fault(FaultKind.REPEAT, 7, who=3, other=2, seconds=0.7),
    ]
    step = Turn((1,))
    play(
        Schedule(
            Setting(latencies=5, log_bytes=150, chunk_tokens=2),
            (Turn((9, 1, 6)), *drains[:2], step, *repeats, drains[2], step, step, step),
        )
    )


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(3015, id="a step is cancelled while a stream is opened anew: no stream stays"),
        pytest.param(10546, id="the end of a session is cancelled: its memory is freed"),
    ],
)
def test_schedules_that_have_failed(number: int) -> None:
    play(draw(number))
