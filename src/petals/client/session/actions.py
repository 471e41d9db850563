"""What a session does next: a pure decision about its hops, its step and its migration.

``next_action`` is the whole of failover's control flow; ``supervisor`` carries its answers out.
Knows no sockets, no clocks and no tensors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

from petals.client.routing.failure_policy import History, Reaction, decide
from petals.errors import PeerTimeout, PeerUnreachable, PetalsError, RouteError, SessionClosed
from petals.swarm.failover_config import FailoverConfig


class LegStatus(Enum):
    """How one hop of a session is."""

    CONNECTED = "it answers"
    DRAINING = "it answers, and has announced that it stops"
    BROKEN = "its stream is lost; it may still hold the rows"
    SLOW = "it answers too slowly and is left for another server"
    GONE = "it refuses, has misbehaved, or does not know the session any more"


@dataclass(frozen=True, slots=True)
class LegState:
    """The status of a hop; ``error`` is the reason of a loss, ``drains_at`` (s, monotonic) the time
    at which a draining server stops. is_booked: the loss has been entered into bans and exclusions.
    """

    status: LegStatus = LegStatus.CONNECTED
    error: PetalsError | None = None
    drains_at: float = 0.0
    is_booked: bool = False

    @property
    def is_lost(self) -> bool:
        """True if no answer will come any more."""
        return self.status in (LegStatus.BROKEN, LegStatus.SLOW, LegStatus.GONE)

    @property
    def may_hold_rows(self) -> bool:
        """True if the hop is lost, and calling it again may bring it and its rows back."""
        return self.status in (LegStatus.BROKEN, LegStatus.SLOW)

    def lost(self, error: PetalsError) -> "LegState":
        """The hop failed. The first reason counts, but what ends the reservation counts more."""
        is_stream = isinstance(error, PeerUnreachable | PeerTimeout) and not error.reported
        status = LegStatus.BROKEN if is_stream else LegStatus.GONE
        if self.status is status or self.status is LegStatus.GONE:
            return self
        return LegState(status, error)

    def slow(self, error: PetalsError) -> "LegState":
        """The hop is left as too slow."""
        return self if self.is_lost else LegState(LegStatus.SLOW, error)

    def draining(self, until: float) -> "LegState":
        """The server has announced that it stops."""
        return self if self.is_lost else LegState(LegStatus.DRAINING, drains_at=until)

    def booked(self) -> "LegState":
        """The same, once the loss has been entered."""
        return replace(self, is_booked=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that the next action depends on.

    history: of the step under way; None between steps. can_feed: the client still has the rows
    that the servers are to hold. fits: no piece of the step is longer than its hops take. failure:
    why the last search for servers found none. num_repairs: attempts to reserve other hops since
    the step last made progress. last_error: the latest loss of a hop. num_copies: copies that the
    migration under way has made; None: no migration is under way. missing_tokens: tokens of a row
    that its replacements lack, at most. migrate_at: earliest time (s, monotonic) of the next one.
    """

    legs: tuple[LegState, ...] = ()
    is_closed: bool = False
    has_diverged: bool = False
    can_feed: bool = True
    fits: bool = True
    failure: PetalsError | None = None
    num_repairs: int = 0
    last_error: PetalsError | None = None
    history: History | None = None
    num_copies: int | None = None
    missing_tokens: int = 0
    migrate_at: float = 0.0


class Do(Enum):
    """Actions that need no more to be said."""

    OPEN_ROUTE = "reserve hops for all blocks, and feed them from the client's own log"
    REBUILD = "give up all hops: their rows are unknown or cannot be handed on"
    RUN = "run the pieces of the step"
    COPY = "send the replacements of draining hops what they lack, while steps go on"
    SWITCH = "send them the rest, and let them take over before the next step"


@dataclass(frozen=True, slots=True)
class Redial:
    """Open new streams to these legs."""

    legs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Reserve hops in the place of lost legs [start, end), fill them, and switch over."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Migrate:
    """Reserve hops that are to take the place of draining legs [start, end)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Pause, call these lost legs, and read the directory."""

    seconds: float
    legs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Raise:
    """End the step with this error."""

    error: PetalsError


Action = Do | Redial | Replace | Migrate | Wait | Raise


def next_action(situation: Situation, config: FailoverConfig, now: float) -> Action | None:
    """The next action; None: there is nothing to do between two steps. ``now``: s, monotonic."""
    if situation.history is None:
        return _between_steps(situation, config, now)
    legs = situation.legs
    if situation.is_closed:
        return Raise(SessionClosed("The session was closed.", hint="Open a new one."))
    broken = []
    for index, leg in enumerate(legs):
        if leg.error is None or leg.is_booked:
            continue
        reaction = decide(leg.error, situation.history).reaction
        if reaction is Reaction.RAISE:
            return Raise(leg.error)
        if reaction is Reaction.RETRY and leg.status is LegStatus.BROKEN:
            broken.append(index)
    if broken and not situation.has_diverged:
        return Redial(tuple(broken))
    if situation.failure is not None:
        return _wait(situation, situation.failure, situation.history)
    if situation.num_repairs > config.max_repairs and situation.last_error is not None:
        return Raise(situation.last_error)
    start, end = _first_run(legs, lambda leg: leg.is_lost)
    from_log = situation.has_diverged or not legs or (start == 0 and end > 0)
    if from_log and not situation.can_feed:
        return Raise(_not_kept())
    if situation.has_diverged or (legs and start == end and not situation.fits):
        return Do.REBUILD
    if not legs:
        return Do.OPEN_ROUTE
    return Replace(start, end) if start < end else Do.RUN


def _wait(situation: Situation, failure: PetalsError, history: History) -> Action:
    """No server was found: how long to wait for one, or whether to give up."""
    decision = decide(failure, history)
    if decision.reaction is not Reaction.WAIT:
        return Raise(failure)
    if situation.has_diverged:
        return Wait(decision.pause_seconds)
    # No other server has these blocks. Only now are lost hops called although they are avoided.
    lost = [index for index, leg in enumerate(situation.legs) if leg.may_hold_rows]
    return Wait(decision.pause_seconds, tuple(lost))


def _between_steps(situation: Situation, config: FailoverConfig, now: float) -> Action | None:
    """Migration; a loss waits for the next step, which repairs it."""
    legs = situation.legs
    is_hurt = situation.has_diverged or any(leg.is_lost for leg in legs)
    start, end = _first_run(legs, lambda leg: leg.status is LegStatus.DRAINING)
    if situation.is_closed or is_hurt or start == end:
        return None
    if situation.num_copies is None:
        seconds = situation.migrate_at - now
        return Wait(seconds) if seconds > 0 else Migrate(start, end)
    is_little = situation.missing_tokens <= config.migration_final_tokens
    if is_little or situation.num_copies >= config.migration_max_copies:
        return Do.SWITCH
    return Do.COPY


def _first_run(legs: Iterable[LegState], has: Callable[[LegState], bool]) -> tuple[int, int]:
    """[start, end) of the first legs in a row that have a property; (0, 0) if none has it."""
    flags = [has(leg) for leg in legs]
    if True not in flags:
        return 0, 0
    start = flags.index(True)
    return start, [*flags, False].index(False, start)


def _not_kept() -> RouteError:
    return RouteError(
        "The session cannot be fed again: its inputs would not fit into max_kept_bytes.",
        hint="Begin a new session with what was generated; raise max_kept_bytes next time.",
    )
