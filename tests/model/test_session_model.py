"""The real session core of both ends in virtual time, under schedules of steps and faults.

`play` fails if an output is not the reference's, if a step does not end in time, if an invariant of
an idle session is broken, or if a reservation is left behind. ``make model-check`` plays more.
"""

import pytest

from support.simulation.faults import Fault, FaultKind
from support.simulation.play import play

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
