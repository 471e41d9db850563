"""What a session does next, as a table: every state of failover and its answer."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from petals.client.routing.failure_policy import History
from petals.client.session.hop import LegState, LegStatus
from petals.client.session.state import (
    Action,
    Do,
    PendingStep,
    Raise,
    Redial,
    Replace,
    ReplicaProgress,
    SessionMigration,
    SessionState,
    StepPiece,
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
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan, PeerId

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
HUNG = OK.hung(seen(PeerTimeout))
SLOW = OK.slow()
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


@dataclass
class Leg:
    """What the decision sees of a hop, which takes at most 8 tokens at a time."""

    state: LegState

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(max_batch_tokens=8)


def idle(*legs: LegState, num_copies: int | None = None, missing: int = 0, **more) -> SessionState:
    """A session between two steps, with a row of 100 tokens."""
    state = SessionState(BlockSpan(0, 3), TokenLog(1), legs=[Leg(leg) for leg in legs], **more)
    state.confirmed.append((100,), torch.zeros(100, 1), (100,) * 100)
    if num_copies is not None:
        have = ReplicaProgress.all_of((100 - missing,))
        state.migration = SessionMigration([], [], have, num_copies)
    return state


def step(
    *legs: LegState,
    history: History = STEP,
    num_repairs: int = 0,
    is_kept: bool = True,
    piece_tokens: int = 1,
    **more,
) -> SessionState:
    """A session during a step of one piece."""
    state = idle(*legs, **more)
    rows = RowSlices.whole_forward((100,), (piece_tokens,), torch.zeros(piece_tokens, 1))
    inputs = state.confirmed.branch()
    state.step = PendingStep(inputs, rows, None, False, 1, history, [StepPiece(7, rows)])
    state.step.num_repairs = num_repairs
    state.step.last_error = next((leg.error for leg in legs if leg.error), None)
    if not is_kept:
        inputs.drop()
    return state


IN_A_STEP: dict[str, tuple[SessionState, Action]] = {
    "first step": (step(history=FIRST), Do.OPEN_ROUTE),
    "all well": (step(OK, OK, OK), Do.RUN),
    "draining hops serve": (step(OK, DRAINS, OK), Do.RUN),
    "slow hops serve": (step(SLOW, OK), Do.RUN),
    # Losses.
    "a broken stream": (step(OK, BROKEN, OK), Redial((1,))),
    "two broken streams": (step(BROKEN, OK, BROKEN), Redial((0, 2))),
    "a broken stream beside a dead hop": (step(BROKEN, SILENT, OK), Redial((0,))),
    "broken again": (step(OK, BROKEN, OK, history=REDIALLED), Replace(1, 2)),
    "silent": (step(OK, SILENT, OK), Replace(1, 2)),
    "hung": (step(HUNG, OK), Replace(0, 1)),
    "misbehaved": (step(OK, OK, LIAR), Replace(2, 3)),
    "failed": (step(OK, FAILED), Replace(1, 2)),
    "refused": (step(OK, REFUSED, OK), Replace(1, 2)),
    "forgot the session": (step(OK, FORGOT), Replace(1, 2)),
    "two neighbours": (step(OK, SILENT, LIAR), Replace(1, 3)),
    "two apart: the first first": (step(SILENT, OK, SILENT), Replace(0, 1)),
    "all": (step(SILENT, HUNG, REFUSED), Replace(0, 3)),
    "failed once too often": (step(OK, FAILED, history=FAILED_OFTEN), Raise(FAILED.error)),
    "booked failures are not counted again": (
        step(OK, FAILED.booked(), history=FAILED_OFTEN),
        Replace(1, 2),
    ),
    "a booked stream is not dialled again": (step(BROKEN.booked(), OK), Replace(0, 1)),
    "repairs without progress end": (
        step(SILENT, OK, num_repairs=CONFIG.max_repairs + 1),
        Raise(SILENT.error),
    ),
    # The servers' rows are unknown, or of no use.
    "diverged": (step(OK, OK, has_diverged=True), Do.REBUILD),
    "diverged: no stream is dialled": (step(OK, BROKEN, has_diverged=True), Do.REBUILD),
    "given up": (step(), Do.OPEN_ROUTE),
    "new hops take shorter pieces": (step(OK, OK, piece_tokens=9), Do.REBUILD),
    "a loss before that": (step(OK, SILENT, piece_tokens=9), Replace(1, 2)),
    # No server was found.
    "nobody serves them, at the first step": (step(history=FIRST, failure=MISSING), Raise(MISSING)),
    "no room at the first step": (step(history=FIRST, failure=FULL), Raise(FULL)),
    "nobody serves them": (step(OK, SILENT.booked(), failure=MISSING), Wait(0.0, (1,))),
    "still nobody": (
        step(OK, HUNG.booked(), history=WAITED, failure=NO_ROOM),
        Wait(CONFIG.look_again_seconds, (1,)),
    ),
    "who refused is not called": (
        step(SILENT.booked(), REFUSED.booked(), failure=FULL),
        Wait(0.0, (0,)),
    ),
    "nobody for a rebuild": (
        step(failure=MISSING, history=WAITED),
        Wait(CONFIG.look_again_seconds),
    ),
    "nobody for too long": (
        step(OK, SILENT.booked(), history=LATE, failure=MISSING),
        Raise(MISSING),
    ),
    "all have refused": (step(OK, REFUSED.booked(), failure=LAST), Raise(LAST)),
}


@pytest.mark.parametrize("case", IN_A_STEP.values(), ids=IN_A_STEP.keys())
def test_in_a_step(case: tuple[SessionState, Action]) -> None:
    state, action = case
    assert next_action(state, CONFIG, NOW) == action


@pytest.mark.parametrize(
    "state", [step(OK, OK), step(BROKEN), step(failure=MISSING), step(has_diverged=True)]
)
def test_a_closed_session_ends_its_step(state: SessionState) -> None:
    state.is_closed = True
    action = next_action(state, CONFIG, NOW)
    assert isinstance(action, Raise) and isinstance(action.error, SessionClosed)


@pytest.mark.parametrize(
    ("state", "is_possible"),
    [
        (step(SILENT, OK, is_kept=False), False),
        (step(OK, has_diverged=True, is_kept=False), False),
        (step(is_kept=False), False),
        (step(OK, SILENT, is_kept=False), True),
        (step(BROKEN, OK, is_kept=False), True),
    ],
)
def test_rows_that_were_not_kept_are_missed_where_they_are_needed(
    state: SessionState, is_possible: bool
) -> None:
    action = next_action(state, CONFIG, NOW)
    assert isinstance(action, Raise) is not is_possible
    if isinstance(action, Raise):
        assert isinstance(action.error, RouteError) and "max_kept_bytes" in str(action.error)


LITTLE, MANY = CONFIG.migration_final_tokens, CONFIG.migration_max_copies

BETWEEN_STEPS: dict[str, tuple[SessionState, Action | None]] = {
    "all well": (idle(OK, OK), None),
    "no route": (idle(), None),
    "one drains": (idle(OK, DRAINS, OK), Replace(1, 2)),
    "one is slow": (idle(OK, SLOW), Replace(1, 2)),
    "neighbours drain": (idle(DRAINS, DRAINS, OK), Replace(0, 2)),
    "two apart drain": (idle(DRAINS, OK, DRAINS), Replace(0, 1)),
    "not yet": (idle(DRAINS, migrate_at=NOW + 2), Wait(2.0)),
    "nothing has been copied": (idle(DRAINS, num_copies=0, missing=99), Do.COPY),
    "there is nothing to copy": (idle(DRAINS, num_copies=0), Do.SWITCH),
    "little is missing": (idle(DRAINS, num_copies=1, missing=LITTLE), Do.SWITCH),
    "much is missing": (idle(DRAINS, num_copies=1, missing=LITTLE + 1), Do.COPY),
    "it never catches up": (idle(DRAINS, num_copies=MANY, missing=99), Do.SWITCH),
    "a repair comes first": (idle(DRAINS, SILENT), None),
    "the draining one is dead": (idle(OK, FORGOT), None),
    "a rebuild comes first": (idle(DRAINS, num_copies=1, has_diverged=True), None),
    "closed": (idle(DRAINS, is_closed=True), None),
}


@pytest.mark.parametrize("case", BETWEEN_STEPS.values(), ids=BETWEEN_STEPS.keys())
def test_between_steps(case: tuple[SessionState, Action | None]) -> None:
    state, action = case
    assert next_action(state, CONFIG, NOW) == action


@pytest.mark.parametrize(
    ("state", "status", "may_hold_rows"),
    [
        (BROKEN, LegStatus.BROKEN, True),
        (SILENT, LegStatus.BROKEN, True),
        (HUNG, LegStatus.HUNG, True),
        (LIAR, LegStatus.GONE, False),
        (OK.lost(said(PeerUnreachable)), LegStatus.GONE, False),
        (DRAINS.lost(seen(PeerUnreachable)), LegStatus.BROKEN, True),
        (HUNG.lost(seen(PeerUnreachable)), LegStatus.BROKEN, True),
        (HUNG.lost(said(SessionClosed)), LegStatus.GONE, False),
        (HUNG.lost(HUNG.error), LegStatus.HUNG, True),  # its own loss, as the reply to a request
        (BROKEN.lost(said(SessionClosed)), LegStatus.GONE, False),
        (BROKEN.hung(seen(PeerTimeout)), LegStatus.BROKEN, True),
        (BROKEN.slow(), LegStatus.BROKEN, True),
        (SLOW.lost(seen(PeerUnreachable)), LegStatus.BROKEN, True),
        (BROKEN.draining(NOW), LegStatus.BROKEN, True),
        (FORGOT.lost(seen(PeerUnreachable)), LegStatus.GONE, False),
    ],
)
def test_losses(state: LegState, status: LegStatus, may_hold_rows: bool) -> None:
    assert (state.status, state.may_hold_rows) == (status, may_hold_rows)
    assert state.is_lost


def test_only_a_hop_that_is_well_is_replaced_as_slow_and_it_alone_is_kept_afterwards() -> None:
    assert DRAINS.slow() is DRAINS and DRAINS.kept() is DRAINS and BROKEN.kept() is BROKEN
    assert SLOW.kept() == OK
    assert SLOW.draining(NOW).status is LegStatus.DRAINING


def test_the_first_reason_counts() -> None:
    assert BROKEN.lost(seen(PeerTimeout)).error is BROKEN.error
    assert REFUSED.lost(said(SessionClosed)).error is REFUSED.error
    assert not OK.is_lost and not DRAINS.is_lost


def test_plain_steps_leave_what_is_held() -> None:
    held = ReplicaProgress.all_of((5, 3)).after(None, (5, 3))
    assert held == ReplicaProgress((0, 1), (5, 3))
    assert held.missing((7, 3)) == (2, 0)


def test_what_is_rolled_back_is_held_no_more() -> None:
    held = ReplicaProgress.all_of((5, 3)).after(None, (2, 3)).after(None, (4, 4))
    assert held.lengths == (2, 3)


def test_reorders_follow_each_other() -> None:
    held = ReplicaProgress.all_of((5, 3, 4)).after((2, 0, 0), (4, 5, 1)).after((1, 2), (5, 1))
    assert held == ReplicaProgress((0, 0), (5, 1))


def test_rows_may_become_more() -> None:
    assert ReplicaProgress.nothing(1).after((0, 0), (3, 3)) == ReplicaProgress((0, 0), (0, 0))
