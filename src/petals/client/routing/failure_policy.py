"""What a client does about an error while a session, a reservation or a training pass runs.

``decide`` is a pure function of the error and of what was tried before; sessions, reservations and
micro-batches all follow it. Two rules are behind it:

*Doubt.* A client checks shapes, dtypes, lengths and token ids before it sends anything, so a server
that refuses a request cannot prove that the request is wrong. Every refusal, whatever its code, is
answered by asking another server; the user sees it only when no server is left.

*No hearsay.* A server is banned for what the client has seen of it (a broken stream, silence, an
output of a wrong shape) and for what it reports of itself (it is busy, it has failed). It is never
banned for what another server says.

Knows no sockets, no clocks and no tensors.
"""

from dataclasses import dataclass, field, replace
from enum import Enum

from petals.client.routing.bans import Cause
from petals.errors import (
    BlocksNotServed,
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    OutboxLost,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    SessionClosed,
    SessionGap,
    TrainingRefused,
)
from petals.types import Hop, PeerId

SELF_REPORTED = (PeerError,)
"""Errors that a server may report of itself: it is busy, it failed, it timed out."""

FORGOTTEN = (SessionClosed, SessionGap, OutboxLost)
"""Errors of a server that lacks the session, some rows of it, or outputs of it."""


class Reaction(Enum):
    """What to do next."""

    RETRY = "ask the same server once more"
    EXCLUDE = "ask another server; this one stays out of this request"
    BAN = "ask another server; every request of this client avoids this one for a time"
    WAIT = "no server can do it now: pause, read the directory, try again"
    RAISE = "raise the error to the user"


@dataclass(frozen=True, slots=True)
class Decision:
    """A reaction and its details.

    cause: of a BAN. refresh: the directory is out of date and has to be read before the next
    attempt. max_pause_seconds: of a WAIT; the time that is left, or 0 for the first attempt, which
    follows at once.
    """

    reaction: Reaction
    cause: Cause | None = None
    refresh: bool = False
    max_pause_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What has happened to one request (a step, a reservation, a micro-batch) since it last made
    progress.

    holds_state: the server keeps rows of the session or activations of the pass, so that its
    silence is a loss and not only a missed call. max_failures: failures that are tolerated before
    the error is raised; None: no limit, since another limit ends the attempts (a repair excludes
    every server that fails, and waits at most ``max_wait_seconds``).
    redialled: servers whose broken stream was opened anew already. forgetful: servers that have
    reported once that they have forgotten the session or a part of it (``FORGOTTEN``).
    waiting_since: time (s, monotonic) of the first WAIT; None: there was none.
    """

    now: float = 0.0
    holds_state: bool = False
    max_failures: int | None = None
    max_wait_seconds: float = 0.0
    num_failures: int = 0
    redialled: frozenset[PeerId] = field(default_factory=frozenset)
    forgetful: frozenset[PeerId] = field(default_factory=frozenset)
    waiting_since: float | None = None

    def after(self, error: PetalsError, decision: Decision) -> "History":
        """The history once ``decision`` was taken because of ``error``."""
        peer = PeerId(error.peer_id)
        match decision.reaction:
            case Reaction.RETRY if isinstance(error, FORGOTTEN):
                return replace(self, forgetful=self.forgetful | {peer})
            case Reaction.RETRY:
                return replace(self, redialled=self.redialled | {peer})
            case Reaction.BAN if not isinstance(error, PeerUnreachable | PeerTimeout):
                return replace(self, num_failures=self.num_failures + 1)
            case Reaction.BAN if not self.holds_state:
                return replace(self, num_failures=self.num_failures + 1)
            case Reaction.WAIT if self.waiting_since is None:
                return replace(self, waiting_since=self.now)
        return self

    def progressed(self) -> "History":
        """The history after the request made progress: earlier failures count no more."""
        return replace(self, num_failures=0, waiting_since=None)


def decide(error: PetalsError, history: History) -> Decision:
    """The reaction to ``error``.

    An error that the client raised by itself about the user's request (RequestError, ConfigError
    without ``reported``) is raised. MissingBlocksError, NoCapacity and CacheFull that the client
    raised by itself mean that no server is left now.
    """
    if error.reported and not isinstance(error, SELF_REPORTED):
        return _refused(error, history)
    if isinstance(error, PeerError):
        return _failed(error, history)
    if isinstance(error, MissingBlocksError | NoCapacity | CacheFull | TrainingRefused):
        return _none_left(history)
    return Decision(Reaction.RAISE)


def _refused(error: PetalsError, history: History) -> Decision:
    """A server will not do it: another one may."""
    if isinstance(error, FORGOTTEN) and PeerId(error.peer_id) not in history.forgetful:
        # Its lease ran out while the client was silent, or its output log was dropped to make room;
        # the server itself is well and may serve the session again, with rows that are new to it.
        return Decision(Reaction.RETRY)
    return Decision(Reaction.EXCLUDE, refresh=isinstance(error, BlocksNotServed))


def _failed(error: PeerError, history: History) -> Decision:
    """A server could not do it, as the client has seen or as the server reports of itself."""
    is_broken = isinstance(error, PeerUnreachable) and not error.reported
    if is_broken and history.holds_state and PeerId(error.peer_id) not in history.redialled:
        # A stream may break although both ends live, and with it everything that the server keeps
        # would be given up: one new stream is cheaper than a replacement.
        return Decision(Reaction.RETRY)
    is_silent = isinstance(error, PeerUnreachable | PeerTimeout)
    is_counted = not (is_silent and history.holds_state)
    cause = Cause.UNANSWERED if is_silent and not history.holds_state else Cause.FAILED
    limit = history.max_failures
    if is_counted and limit is not None and history.num_failures >= limit:
        return Decision(Reaction.RAISE, cause)
    return Decision(Reaction.BAN, cause)


def _none_left(history: History) -> Decision:
    """No server is left: wait for one until ``max_wait_seconds`` are over."""
    if history.waiting_since is None:
        is_allowed = history.max_wait_seconds > 0
        # The first reading of the directory follows at once: a replacement may be there already.
        return Decision(Reaction.WAIT, refresh=True) if is_allowed else Decision(Reaction.RAISE)
    left = history.waiting_since + history.max_wait_seconds - history.now
    if left <= 0:
        return Decision(Reaction.RAISE)
    return Decision(Reaction.WAIT, refresh=True, max_pause_seconds=left)


def misbehaved(hop: Hop, what: str) -> PeerMisbehaved:
    """The error for an answer of ``hop`` that cannot be right."""
    return PeerMisbehaved(
        f"The server of blocks {hop.blocks} answered with {what}.",
        hint="It is avoided from now on; report it to the operators of the swarm.",
        peer_id=hop.peer_id,
    )
