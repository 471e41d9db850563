"""Drawn schedules: which swarms, which steps and which faults the model check plays.

A schedule follows from its number alone. Every schedule draws a few kinds of faults and of steps of
its own, since faults of all kinds at once hide each other.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from support.simulation.faults import CODES, LIES, Fault, FaultKind
from support.simulation.schedule import LAYOUTS, Event, Fork, Rest, Schedule, Setting, Turn

ADVERSARIAL = (FaultKind.LOSE, FaultKind.REPEAT, FaultKind.OVERTAKE)
"""What no real stream does that goes on: single messages lost, repeated, reordered. Only schedules
with odd numbers have such faults.
"""

ALL_KINDS = tuple(kind for kind in FaultKind if kind is not FaultKind.CLOSE)
REALISTIC = tuple(kind for kind in ALL_KINDS if kind not in ADVERSARIAL)

_MAX_KINDS = 6
_MAX_ROUNDS = 6
_MAX_FAULTS = 3
"""Kinds of faults in a schedule, rounds of a schedule, and faults in a round, at most."""

_NUM_PLACES = 24
"""Messages from one step to the end of its repair, and some of the next step."""

_FORK_SHARE = 0.3
"""Share of schedules in which the session is forked, so that two copies of it are played."""

_CLOSE_SHARE = 0.2
"""Share of schedules in which the user closes the session during the last step."""


def draw(number: int, kinds: Collection[FaultKind] = (), **setting: Any) -> Schedule:
    """A first step, then rounds of faults and the step or the pause that they strike.

    kinds: the faults to choose from; none: all of them. setting: fields of ``Setting`` that are not
    drawn.
    """
    chance = random.Random(number)
    known = list(kinds or (ALL_KINDS if number % 2 else REALISTIC))
    chosen = chance.sample(known, min(len(known), chance.randint(1, _MAX_KINDS)))
    turns = chance.choices(_TURNS, k=2)
    events: list[Event] = [chance.choice((_append, _prompt))(chance)]
    num_rounds = chance.randint(2, _MAX_ROUNDS)
    has_forks = random.Random(f"forks of {number}").random() < _FORK_SHARE
    for number_of_round in range(num_rounds):
        is_last = number_of_round == num_rounds - 1
        events += _faults(chance, chosen)
        if is_last and chance.random() < _CLOSE_SHARE:
            events.append(Fault(FaultKind.CLOSE, at=_at(chance)))
        is_rest = chance.random() < 0.25
        rest = Rest(chance.choice((0.1, 1.0, 9.0)))
        events.append(rest if is_rest else chance.choice(turns)(chance))
        if has_forks and chance.random() < 0.5:
            events += [*_faults(chance, chosen), Fork()]
    return Schedule(replace(_setting(chance), **setting), tuple(events))


def at_every_message(faults: Callable[[int], tuple[Fault, ...]]) -> Iterator[Schedule]:
    """The same steps of two hops again and again; the faults are moved from message to message."""
    turns = (Turn((1,)), Turn((5,)), Rest(1.0), Turn((5,)), Rest(1.0), Turn((1,)))
    for at in range(_NUM_PLACES):
        yield Schedule(Setting(num_rows=1), (Turn((4,)), *faults(at), *turns))


def _setting(chance: random.Random) -> Setting:
    """Small logs and small memory are rare: they end what a session can survive."""
    return Setting(
        layout=chance.choice(sorted(LAYOUTS)),
        num_rows=chance.randint(1, 3),
        is_direct=chance.random() < 0.7,
        has_max_length=chance.random() < 0.5,
        latencies=chance.randint(0, 5),
        kept_bytes=chance.choice((0, 0, 0, 0, 200)),
        log_bytes=chance.choice((0, 0, 0, 150)),
        has_kv_format=chance.random() < 0.5,
        chunk_tokens=chance.choice((2, 4, 16)),
    )


def _append(chance: random.Random) -> Turn:
    return Turn((1,))


def _prompt(chance: random.Random) -> Turn:
    return Turn(_three(chance, 1, 9))


def _roll_back(chance: random.Random) -> Turn:
    return Turn(_three(chance, 0, 3), _three(chance, 0, 4))


def _reorder(chance: random.Random) -> Turn:
    order = tuple(chance.randint(0, 2) for _ in range(chance.randint(1, 3)))
    return Turn(_three(chance, 0, 3), _three(chance, 0, 2), order)


_TURNS = (_append, _append, _prompt, _roll_back, _reorder)


def _three(chance: random.Random, least: int, most: int) -> tuple[int, ...]:
    return tuple(chance.randint(least, most) for _ in range(3))


def _faults(chance: random.Random, kinds: Sequence[FaultKind]) -> list[Fault]:
    """Faults of these kinds at any of the next messages; in half of all rounds each one strikes
    while the one before it is being repaired.
    """
    at, is_close, faults = 0, chance.random() < 0.5, []
    for _ in range(chance.randint(0, _MAX_FAULTS)):
        pause = chance.choice((0, 0, 1, 4, 7, 10))
        at = at + pause if is_close and faults else _at(chance)
        faults.append(
            Fault(
                kind=chance.choice(kinds),
                at=at,
                who=chance.randint(0, 6),
                other=chance.randint(0, 6),
                seconds=chance.choice((0.02, 0.2, 0.7, 0.7, 1.5, 3.0, 8.0)),
                code=chance.randrange(max(len(CODES), len(LIES))),
            )
        )
    return faults


def _at(chance: random.Random) -> int:
    return chance.randint(0, chance.choice((3, 6, 24)))
