"""What a session does next, as a table: every situation of failover and its answer."""

from dataclasses import replace

import pytest

from petals.client.routing.failure_policy import LOOK_AGAIN_SECONDS, History
from petals.client.session.actions import (
    Action,
    Do,
    LegState,
    LegStatus,
    Migrate,
    Raise,
    Redial,
    Replace,
    Situation,
    Wait,
    next_action,
)
from petals.errors import (
    BadInput,
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    PeerFailed,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    RouteError,
    SessionClosed,
    from_wire,
)
from petals.swarm.failover_config import FailoverConfig
from petals.types import PeerId

CONFIG = FailoverConfig()
NOW = 1000.0
PEER = PeerId("server")


def seen(kind: type[PetalsError]) -> PetalsError:
    return kind("It happened.", peer_id=PEER)


def said(kind: type[PetalsError]) -> PetalsError:
    return from_wire(kind.code, "It happened.", "", PEER)


OK = LegState()
BROKEN = OK.lost(seen(PeerUnreachable))
SILENT = OK.lost(seen(PeerTimeout))
SLOW = OK.slow(seen(PeerTimeout))
LIAR = OK.lost(seen(PeerMisbehaved))
FAILED = OK.lost(said(PeerFailed))
REFUSED = OK.lost(said(BadInput))
FORGOT = OK.lost(said(SessionClosed))
DRAINS = OK.draining(NOW + 60)
MISSING, FULL, NO_ROOM = seen(MissingBlocksError), seen(CacheFull), seen(NoCapacity)
LAST = said(BadInput)

STEP = History(now=NOW, holds_state=True, max_failures=3, max_wait_seconds=60.0)
FIRST = replace(STEP, max_wait_seconds=0.0)
REDIALLED = replace(STEP, redialled=frozenset({PEER}))
WAITED = replace(STEP, waiting_since=NOW - 10)
LATE = replace(STEP, waiting_since=NOW - 60)
FAILED_OFTEN = replace(STEP, num_failures=3)


def step(*legs: LegState, history: History = STEP, **more: object) -> Situation:
    return Situation(legs=legs, history=history, **more)


def idle(*legs: LegState, **more: object) -> Situation:
    return Situation(legs=legs, **more)


IN_A_STEP: dict[str, tuple[Situation, Action]] = {
    "first step": (step(history=FIRST), Do.OPEN_ROUTE),
    "all well": (step(OK, OK, OK), Do.RUN),
    "draining hops serve": (step(OK, DRAINS, OK), Do.RUN),
    # Losses.
    "a broken stream": (step(OK, BROKEN, OK), Redial((1,))),
    "two broken streams": (step(BROKEN, OK, BROKEN), Redial((0, 2))),
    "a broken stream beside a dead hop": (step(BROKEN, SILENT, OK), Redial((0,))),
    "broken again": (step(OK, BROKEN, OK, history=REDIALLED), Replace(1, 2)),
    "silent": (step(OK, SILENT, OK), Replace(1, 2)),
    "slow": (step(SLOW, OK), Replace(0, 1)),
    "misbehaved": (step(OK, OK, LIAR), Replace(2, 3)),
    "failed": (step(OK, FAILED), Replace(1, 2)),
    "refused": (step(OK, REFUSED, OK), Replace(1, 2)),
    "forgot the session": (step(OK, FORGOT), Replace(1, 2)),
    "two neighbours": (step(OK, SILENT, LIAR), Replace(1, 3)),
    "two apart: the first first": (step(SILENT, OK, SILENT), Replace(0, 1)),
    "all": (step(SILENT, SLOW, REFUSED), Replace(0, 3)),
    "failed once too often": (step(OK, FAILED, history=FAILED_OFTEN), Raise(FAILED.error)),
    "booked failures are not counted again": (
        step(OK, FAILED.booked(), history=FAILED_OFTEN),
        Replace(1, 2),
    ),
    "a booked stream is not dialled again": (step(BROKEN.booked(), OK), Replace(0, 1)),
    "repairs without progress end": (
        step(SILENT, OK, num_repairs=CONFIG.max_repairs + 1, last_error=SILENT.error),
        Raise(SILENT.error),
    ),
    # The servers' rows are unknown, or of no use.
    "diverged": (step(OK, OK, has_diverged=True), Do.REBUILD),
    "diverged: no stream is dialled": (step(OK, BROKEN, has_diverged=True), Do.REBUILD),
    "given up": (step(), Do.OPEN_ROUTE),
    "new hops take shorter pieces": (step(OK, OK, fits=False), Do.REBUILD),
    "a loss before that": (step(OK, SILENT, fits=False), Replace(1, 2)),
    # No server was found.
    "nobody serves them, at the first step": (step(history=FIRST, failure=MISSING), Raise(MISSING)),
    "no room at the first step": (step(history=FIRST, failure=FULL), Raise(FULL)),
    "nobody serves them": (step(OK, SILENT.booked(), failure=MISSING), Wait(0.0, (1,))),
    "still nobody": (
        step(OK, SLOW.booked(), history=WAITED, failure=NO_ROOM),
        Wait(LOOK_AGAIN_SECONDS, (1,)),
    ),
    "who refused is not called": (
        step(SILENT.booked(), REFUSED.booked(), failure=FULL),
        Wait(0.0, (0,)),
    ),
    "nobody for a rebuild": (step(failure=MISSING, history=WAITED), Wait(LOOK_AGAIN_SECONDS)),
    "nobody for too long": (
        step(OK, SILENT.booked(), history=LATE, failure=MISSING),
        Raise(MISSING),
    ),
    "all have refused": (step(OK, REFUSED.booked(), failure=LAST), Raise(LAST)),
}


@pytest.mark.parametrize("case", IN_A_STEP.values(), ids=IN_A_STEP.keys())
def test_in_a_step(case: tuple[Situation, Action]) -> None:
    situation, action = case
    assert next_action(situation, CONFIG, NOW) == action


@pytest.mark.parametrize(
    "situation", [step(OK, OK), step(BROKEN), step(failure=MISSING), step(has_diverged=True)]
)
def test_a_closed_session_ends_its_step(situation: Situation) -> None:
    action = next_action(replace(situation, is_closed=True), CONFIG, NOW)
    assert isinstance(action, Raise) and isinstance(action.error, SessionClosed)


@pytest.mark.parametrize(
    ("situation", "is_possible"),
    [
        (step(SILENT, OK, can_feed=False), False),
        (step(OK, has_diverged=True, can_feed=False), False),
        (step(can_feed=False), False),
        (step(OK, SILENT, can_feed=False), True),
        (step(BROKEN, OK, can_feed=False), True),
    ],
)
def test_rows_that_were_not_kept_are_missed_where_they_are_needed(
    situation: Situation, is_possible: bool
) -> None:
    action = next_action(situation, CONFIG, NOW)
    assert isinstance(action, Raise) is not is_possible
    if isinstance(action, Raise):
        assert isinstance(action.error, RouteError) and "max_kept_bytes" in str(action.error)


LITTLE, MANY = CONFIG.migration_final_tokens, CONFIG.migration_max_copies

BETWEEN_STEPS: dict[str, tuple[Situation, Action | None]] = {
    "all well": (idle(OK, OK), None),
    "no route": (idle(), None),
    "one drains": (idle(OK, DRAINS, OK), Migrate(1, 2)),
    "neighbours drain": (idle(DRAINS, DRAINS, OK), Migrate(0, 2)),
    "two apart drain": (idle(DRAINS, OK, DRAINS), Migrate(0, 1)),
    "not yet": (idle(DRAINS, migrate_at=NOW + 2), Wait(2.0)),
    "nothing has been copied": (idle(DRAINS, num_copies=0, missing_tokens=99), Do.COPY),
    "there is nothing to copy": (idle(DRAINS, num_copies=0), Do.SWITCH),
    "little is missing": (idle(DRAINS, num_copies=1, missing_tokens=LITTLE), Do.SWITCH),
    "much is missing": (idle(DRAINS, num_copies=1, missing_tokens=LITTLE + 1), Do.COPY),
    "it never catches up": (idle(DRAINS, num_copies=MANY, missing_tokens=99), Do.SWITCH),
    "a repair comes first": (idle(DRAINS, SILENT), None),
    "the draining one is dead": (idle(OK, FORGOT), None),
    "a rebuild comes first": (idle(DRAINS, num_copies=1, has_diverged=True), None),
    "closed": (idle(DRAINS, is_closed=True), None),
}


@pytest.mark.parametrize("case", BETWEEN_STEPS.values(), ids=BETWEEN_STEPS.keys())
def test_between_steps(case: tuple[Situation, Action | None]) -> None:
    situation, action = case
    assert next_action(situation, CONFIG, NOW) == action


@pytest.mark.parametrize(
    ("state", "status", "may_hold_rows"),
    [
        (BROKEN, LegStatus.BROKEN, True),
        (SILENT, LegStatus.BROKEN, True),
        (SLOW, LegStatus.SLOW, True),
        (LIAR, LegStatus.GONE, False),
        (OK.lost(said(PeerUnreachable)), LegStatus.GONE, False),
        (DRAINS.lost(seen(PeerUnreachable)), LegStatus.BROKEN, True),
        (SLOW.lost(seen(PeerUnreachable)), LegStatus.BROKEN, True),
        (SLOW.lost(said(SessionClosed)), LegStatus.GONE, False),
        (BROKEN.lost(said(SessionClosed)), LegStatus.GONE, False),
        (BROKEN.slow(seen(PeerTimeout)), LegStatus.BROKEN, True),
        (BROKEN.draining(NOW), LegStatus.BROKEN, True),
        (FORGOT.lost(seen(PeerUnreachable)), LegStatus.GONE, False),
    ],
)
def test_losses(state: LegState, status: LegStatus, may_hold_rows: bool) -> None:
    assert (state.status, state.may_hold_rows) == (status, may_hold_rows)
    assert state.is_lost


def test_the_first_reason_counts() -> None:
    assert BROKEN.lost(seen(PeerTimeout)).error is BROKEN.error
    assert REFUSED.lost(said(SessionClosed)).error is REFUSED.error
    assert not OK.is_lost and not DRAINS.is_lost
