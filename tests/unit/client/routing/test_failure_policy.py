"""What a client does about an error: one table for sessions, reservations and training passes."""

from dataclasses import replace

import pytest

from petals.client.routing.bans import Cause
from petals.client.routing.failure_policy import (
    FORGOTTEN,
    Decision,
    History,
    Reaction,
    decide,
)
from petals.errors import (
    ERRORS_BY_CODE,
    BadInput,
    BlocksNotServed,
    CacheFull,
    ConfigError,
    LengthExceeded,
    MissingBlocksError,
    NoCapacity,
    OutboxLost,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    ProtocolError,
    SessionClosed,
    SessionGap,
    TrainingRefused,
    from_wire,
)
from petals.types import PeerId

PEER = PeerId("server")
SESSION = History(holds_state=True, max_failures=3, max_wait_seconds=60.0)
OPENING = History(max_failures=3, max_wait_seconds=60.0)
BAN, EXCLUDE, RETRY = Reaction.BAN, Reaction.EXCLUDE, Reaction.RETRY
RAISE, WAIT = Reaction.RAISE, Reaction.WAIT


def seen(kind: type[PetalsError]) -> PetalsError:
    """An error that the client has met by itself."""
    return kind("It happened.", peer_id=PEER)


def said(kind: type[PetalsError]) -> PetalsError:
    """The same as a server's words."""
    return from_wire(kind.code, "It happened.", "Do something.", PEER)


TABLE = {
    # The user's own request, found wrong before anything was sent.
    "wrong input": (seen(BadInput), SESSION, Decision(RAISE)),
    "too long": (seen(LengthExceeded), OPENING, Decision(RAISE)),
    "wrong config": (seen(ConfigError), OPENING, Decision(RAISE)),
    # What the client has seen of a server.
    "broken stream, first": (seen(PeerUnreachable), SESSION, Decision(RETRY)),
    "broken stream, again": (
        seen(PeerUnreachable),
        replace(SESSION, redialled=frozenset({PEER})),
        Decision(BAN, Cause.FAILED),
    ),
    "broken stream of another before": (
        seen(PeerUnreachable),
        replace(SESSION, redialled=frozenset({PeerId("another")})),
        Decision(RETRY),
    ),
    "no stream at all": (seen(PeerUnreachable), OPENING, Decision(BAN, Cause.UNANSWERED)),
    "silence": (seen(PeerTimeout), SESSION, Decision(BAN, Cause.FAILED)),
    "silence at a dial": (seen(PeerTimeout), OPENING, Decision(BAN, Cause.UNANSWERED)),
    "output of a wrong shape": (
        seen(PeerMisbehaved),
        SESSION,
        Decision(BAN, Cause.FAILED),
    ),
    "bytes of another protocol": (seen(ProtocolError), OPENING, Decision(BAN, Cause.FAILED)),
    # What a server says of itself.
    "busy": (said(PeerBusy), OPENING, Decision(BAN, Cause.FAILED)),
    "failed": (said(PeerFailed), SESSION, Decision(BAN, Cause.FAILED)),
    "failed too often": (
        said(PeerFailed),
        replace(SESSION, num_failures=3),
        Decision(RAISE, Cause.FAILED),
    ),
    "failed often in a repair": (
        said(PeerFailed),
        replace(OPENING, num_failures=30, max_failures=None),
        Decision(BAN, Cause.FAILED),
    ),
    "silence is never too often": (
        seen(PeerTimeout),
        replace(SESSION, num_failures=30),
        Decision(BAN, Cause.FAILED),
    ),
    "another peer misbehaved, says a server": (
        said(PeerMisbehaved),
        SESSION,
        Decision(BAN, Cause.FAILED),
    ),
    # What a server says of the request.
    "moved away": (said(BlocksNotServed), OPENING, Decision(EXCLUDE, refresh=True)),
    "lease ran out": (said(SessionClosed), SESSION, Decision(RETRY)),
    "lease ran out, again": (
        said(SessionClosed),
        replace(SESSION, forgetful=frozenset({PEER})),
        Decision(EXCLUDE),
    ),
    "outputs were dropped": (said(OutboxLost), SESSION, Decision(RETRY)),
    "rows are missing": (said(SessionGap), SESSION, Decision(RETRY)),
    "rows are missing, again": (
        said(SessionGap),
        replace(SESSION, forgetful=frozenset({PEER})),
        Decision(EXCLUDE),
    ),
    # No server is left.
    "no server": (seen(MissingBlocksError), SESSION, Decision(WAIT, refresh=True)),
    "no room": (seen(NoCapacity), SESSION, Decision(WAIT, refresh=True)),
    "no cache": (seen(CacheFull), SESSION, Decision(WAIT, refresh=True)),
    "no training": (seen(TrainingRefused), SESSION, Decision(WAIT, refresh=True)),
    "no server, and no patience": (
        seen(MissingBlocksError),
        replace(SESSION, max_wait_seconds=0.0),
        Decision(RAISE),
    ),
    "no server for 10 s": (
        seen(MissingBlocksError),
        replace(SESSION, waiting_since=0.0, now=10.0),
        Decision(WAIT, refresh=True, max_pause_seconds=50.0),
    ),
    "no server for 59.9 s": (
        seen(MissingBlocksError),
        replace(SESSION, waiting_since=0.0, now=59.9),
        Decision(WAIT, refresh=True, max_pause_seconds=pytest.approx(0.1)),
    ),
    "no server for 60 s": (
        seen(MissingBlocksError),
        replace(SESSION, waiting_since=0.0, now=60.0),
        Decision(RAISE),
    ),
}


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
def test_table(case: tuple[PetalsError, History, Decision]) -> None:
    error, history, decision = case
    assert decide(error, history) == decision


REFUSALS = [
    kind
    for kind in ERRORS_BY_CODE.values()
    if not issubclass(kind, PeerError) and kind not in FORGOTTEN
]


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.code)
def test_no_word_of_a_server_is_the_users_fault_or_a_reason_to_ban(
    kind: type[PetalsError],
) -> None:
    for history in (SESSION, OPENING, replace(SESSION, num_failures=30)):
        assert decide(said(kind), history).reaction is EXCLUDE


@pytest.mark.parametrize("kind", ERRORS_BY_CODE.values(), ids=lambda kind: kind.code)
def test_a_servers_words_are_shown_as_its_own(kind: type[PetalsError]) -> None:
    error = said(kind)
    assert str(error).startswith("Peer …server says: It happened. (Do something.)")
    assert error.hint == kind.default_hint


ENDLESS = [seen(PeerUnreachable), seen(PeerTimeout), seen(PeerMisbehaved), said(PeerFailed)]


@pytest.mark.parametrize("error", ENDLESS, ids=lambda error: error.code)
def test_attempts_at_opening_end(error: PetalsError) -> None:
    history, reactions = OPENING, []
    while not reactions or reactions[-1] is not RAISE:
        decision = decide(error, history)
        history = history.after(error, decision)
        reactions.append(decision.reaction)
    assert reactions == [BAN, BAN, BAN, RAISE]


def test_waiting_ends() -> None:
    error, history, pauses = seen(MissingBlocksError), SESSION, []
    while (decision := decide(error, history)).reaction is WAIT:
        history = history.after(error, decision)
        pauses.append(min(decision.max_pause_seconds, 7.0))
        history = replace(history, now=history.now + pauses[-1])
    assert sum(pauses) == SESSION.max_wait_seconds
    assert decide(error, history.progressed()).reaction is WAIT


def test_each_server_is_dialled_again_once() -> None:
    error = seen(PeerUnreachable)
    history = SESSION.after(error, decide(error, SESSION))
    assert decide(error, history).reaction is BAN
    lost = said(SessionClosed)
    history = history.after(lost, decide(lost, history))
    assert decide(lost, history).reaction is EXCLUDE


def test_a_gap_at_a_server_is_filled_once_and_then_answered_by_another() -> None:
    history = SESSION.after(said(SessionGap), decide(said(SessionGap), SESSION))
    assert decide(said(SessionGap), history).reaction is EXCLUDE
    assert decide(seen(SessionGap), SESSION).reaction is RAISE
