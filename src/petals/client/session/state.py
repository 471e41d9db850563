"""The state of one session, with one owner and one lock, and what is to be done next.

``next_action`` is the whole of failover's control flow, a pure function of the state and a time;
``supervisor`` carries its answers out.

Invariants, which make failover correct; ``check_integrity`` asserts what can be seen of them:

I1. Hops and epoch change only while ``lock`` is held, and only the session's supervisor changes
    them. The epoch only grows.
I2. A step that is repeated keeps its pieces and their request ids, so that a hop that has run a
    piece answers again and does no work twice. Only a rebuild, after which no hop has run
    anything, cuts the step anew, under new ids.
I3. A hop is filled by one replay at a time. Every replay has an id of its own, and a hop drops the
    parts of all replays but the newest.
I4. Hops join in the current epoch, under an id that no other reservation has, and are filled
    before they take part in a step. A repair ends a migration under way first.
I5. The hops of a route and its epoch change together, without a pause in between. A hop that has
    not received the epoch yet receives it before the next step.
I6. A step that cuts or reorders rows and does not come to its end leaves rows at the servers that
    the client does not know: the session has diverged, and the next step begins with a rebuild. A
    step that only appends does not: the next step cuts off what it has left.
I7. A step reorders rows once, however often it is repeated: a hop that has been filled with rows in
    their new order (``reordered``) does not reorder them again.
I8. A replay begins with where the rows stand at the receiver (``reorder``, ``starts``), so it may
    be repeated; its parts are numbered, so a lost part is noticed.
I9. A hop accepts states from the client and from the hop before it in the current epoch, and from
    no other peer.
I10. A session is forked between two steps, with the rows that all of its hops hold then. The fork
    has an epoch, ids and a log of its own, so that neither of the two needs the other afterwards.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count, pairwise

from torch import Tensor

from petals.client.routing.failure_policy import Decision, History, Reaction, decide
from petals.client.session.hop import HopSession, LegStatus
from petals.client.trace import Repair
from petals.errors import PetalsError, RouteError, SessionClosed
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan, Hop, PeerId

_KEPT_REPAIRS = 256
"""Number of latest repairs that the trace shows."""


@dataclass(slots=True, eq=False)
class StepPiece:
    """A part of a step that every hop runs at once. output: [tokens, H], None until it is known."""

    request_id: int
    rows: RowSlices
    reorder: tuple[int, ...] | None = None
    output: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.rows.counts)


@dataclass(slots=True, eq=False)
class PendingStep:
    """One step of the session, in pieces for the route that is to run it.

    inputs: the rows as the step finds them, then with the tokens of finished pieces. rest: what
    remains. reorder: what the servers must do to their ``server_rows`` rows first. cuts_rows: the
    step reorders rows or cuts some. num_repairs: attempts to reserve other hops since the last
    progress. has_warned: a warning was logged that the step waits for servers.
    """

    inputs: TokenLog
    rest: RowSlices
    reorder: tuple[int, ...] | None
    cuts_rows: bool
    server_rows: int
    history: History
    pieces: list[StepPiece] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    last_error: PetalsError | None = None
    num_repairs: int = 0
    has_warned: bool = False

    @property
    def is_done(self) -> bool:
        return not any(self.rest.counts)

    @property
    def needed_lengths(self) -> tuple[int, ...]:
        """Tokens that the step needs of every row that servers have before its reorder."""
        if self.reorder is None:
            return self.inputs.lengths
        lengths = [0] * self.server_rows
        for row, length in zip(self.reorder, self.inputs.lengths):
            lengths[row] = max(lengths[row], length)
        return tuple(lengths)

    def cut(self, max_tokens: int, ids: Iterator[int]) -> None:
        """Make pieces of what remains, of at most ``max_tokens`` tokens (0: no limit), unless there
        are some (I2).
        """
        if not self.pieces:
            parts = self.rest.parts(max_tokens)
            self.pieces = [StepPiece(next(ids), part) for part in parts]
            self.pieces[0].reorder = self.reorder

    def settle(self) -> bool:
        """Take the pieces that are done, from the first on, out of what remains. True if any."""
        num_outputs = len(self.outputs)
        while self.pieces and self.pieces[0].output is not None:
            piece = self.pieces.pop(0)
            assert piece.output is not None
            self.outputs.append(piece.output)
            self.inputs.append(piece.rows.counts, piece.rows.hidden, piece.rows.rope_lengths)
            self.reorder, self.server_rows = None, len(piece.rows.counts)
            ends = [start + number for start, number in zip(self.rest.starts, self.rest.counts)]
            starts = self.inputs.lengths
            counts = tuple(end - start for end, start in zip(ends, starts))
            done, rest = piece.num_tokens, self.rest
            self.rest = RowSlices(starts, counts, rest.hidden[done:], rest.rope_lengths[done:])
        return len(self.outputs) > num_outputs


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """What a replacement has of a session's rows: the first ``lengths[r]`` tokens of row r, in its
    own row ``rows[r]``.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def nothing(cls, num_rows: int) -> "ReplicaProgress":
        return cls((0,) * num_rows, (0,) * num_rows)

    @classmethod
    def all_of(cls, lengths: tuple[int, ...]) -> "ReplicaProgress":
        return cls(tuple(range(len(lengths))), lengths)

    def after(self, reorder: tuple[int, ...] | None, starts: Sequence[int]) -> "ReplicaProgress":
        """The same once a step has reordered the rows and cut them to ``starts``."""
        order = range(len(self.rows)) if reorder is None else reorder
        return ReplicaProgress(
            tuple(self.rows[row] for row in order),
            tuple(min(self.lengths[row], start) for row, start in zip(order, starts)),
        )

    def missing(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each row that the replacement lacks."""
        return tuple(length - have for length, have in zip(lengths, self.lengths, strict=True))


@dataclass(slots=True, eq=False)
class SessionMigration:
    """``hops`` are to take the place of the ``old`` ones, which drain or are slow.

    have: what they have, or will have once the copy under way has arrived, of the rows as they are
    now.
    """

    old: list[HopSession]
    hops: list[HopSession]
    have: ReplicaProgress
    num_copies: int = 0


@dataclass(slots=True, eq=False)
class SessionState:
    """See the module's invariants.

    confirmed: the rows that every server holds between two steps; its lengths are the only answer
    to how many they hold. has_diverged: a failed step may have changed them (I6), or a server
    cannot hand them on. joining: hops that are reserved and not part of the route yet. losses: hops
    that are lost and not replaced yet, and why. excluded: servers that refused the step under way,
    in the order of their refusals. failure: why the last search for servers found none. migrate_at:
    earliest time (s, monotonic) of the next migration.
    """

    blocks: BlockSpan
    confirmed: TokenLog
    epoch: int = 0
    legs: list[HopSession] = field(default_factory=list)
    joining: list[HopSession] = field(default_factory=list)
    is_closed: bool = False
    has_diverged: bool = False
    step: PendingStep | None = None
    migration: SessionMigration | None = None
    migrate_at: float = 0.0
    losses: dict[Hop, str] = field(default_factory=dict)
    excluded: dict[PeerId, PetalsError] = field(default_factory=dict)
    failure: PetalsError | None = None
    arithmetics: dict[PeerId, str] = field(default_factory=dict)
    """`Info.arithmetic` of every server that has been in the route."""
    repairs: deque[Repair] = field(default_factory=lambda: deque(maxlen=_KEPT_REPAIRS))
    ids: Iterator[int] = field(default_factory=lambda: count(1))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def num_rows(self) -> int:
        """Rows that the session has now: during a step, after its reorder."""
        return len((self.confirmed if self.step is None else self.step.inputs).lengths)

    @property
    def max_step_tokens(self) -> int:
        """Tokens the smallest hop takes in one step; 0 if none of them has a limit."""
        limits = [leg.info.max_batch_tokens for leg in self.legs]
        return min((limit for limit in limits if limit), default=0)

    @property
    def must_migrate(self) -> bool:
        """A hop of the route is to be replaced while it serves."""
        return any(leg.state.migrates for leg in self.legs)

    def begin(
        self, rows: RowSlices, reorder: tuple[int, ...] | None, history: History
    ) -> PendingStep:
        """A step begins, which reorders the rows, cuts them to ``rows.starts`` and appends."""
        lengths = self.confirmed.lengths
        cuts_rows = reorder is not None or rows.starts != lengths
        inputs = self.confirmed.branch(rows.starts, reorder)
        self.step = PendingStep(inputs, rows, reorder, cuts_rows, len(lengths), history)
        self.failure = None
        self.excluded.clear()
        if self.migration is not None:
            self.migration.have = self.migration.have.after(reorder, rows.starts)
        return self.step

    def switch(self, old: Sequence[HopSession], hops: Sequence[HopSession]) -> None:
        """Put ``hops`` in the place of ``old`` legs and begin an epoch (I5); the first hops of a
        route join in the present one.
        """
        start = self.legs.index(old[0]) if old else 0
        self.epoch += bool(self.legs)
        self.legs[start : start + len(old)] = hops
        self.joining = [hop for hop in self.joining if hop not in hops]
        self.arithmetics |= {hop.peer_id: hop.info.arithmetic for hop in hops}

    def note_repair(self, old: Hop, reason: str, seconds: float) -> Repair:
        """Record which legs serve the blocks of ``old`` now. ``seconds``: how long no step ran."""
        new = [leg for leg in self.legs if leg.blocks.overlaps(old.blocks)]
        before = self.arithmetics.get(old.peer_id, "")
        others = {leg.info.arithmetic for leg in new} - {before, ""}
        self.repairs.append(
            Repair(
                old.peer_id,
                old.blocks,
                reason,
                tuple(leg.hop for leg in new),
                seconds,
                f"{before}; now {', '.join(sorted(others))}" if before and others else "",
            )
        )
        return self.repairs[-1]

    def take_unused(self) -> list[HopSession]:
        """Hops that a repair has left when it was interrupted; they join no more. Also what a
        closed session has reserved since.
        """
        kept = [] if self.migration is None else self.migration.hops
        unused = [hop for hop in self.joining if hop not in kept]
        self.joining = list(kept)
        return [*unused, *self.legs] if self.is_closed else unused

    async def announce_epoch(self) -> None:
        """Announce the epoch, and the sources of states in it, to all legs that lack it (I5)."""
        for leg in self.legs:
            if leg.epoch != self.epoch and not leg.state.is_lost:
                await self.announce_to(leg)

    async def announce_to(self, leg: HopSession) -> None:
        """Announce the epoch and the sources of states to a leg, on its present stream."""
        index = self.legs.index(leg)
        await leg.begin_epoch(self.epoch, [self.legs[index - 1].peer_id] if index else [])

    def check_integrity(self) -> None:
        """Assert the invariants of an idle session. Raises AssertionError."""
        assert self.step is None, "a step is under way (I1)"
        if self.is_closed or self.has_diverged or not self.legs:
            return
        hops = [*self.legs, *self.joining]
        assert self.legs[0].blocks.start == self.blocks.start
        assert self.legs[-1].blocks.end == self.blocks.end
        for near, far in pairwise(self.legs):
            assert near.blocks.end == far.blocks.start, "the route has a gap or an overlap"
        assert len({hop.session_id for hop in hops}) == len(hops), "an id is used twice (I4)"
        assert self.joining == (self.migration.hops if self.migration else []), "a forgotten hop"
        assert all(hop.epoch == self.epoch for hop in self.joining), "of another epoch (I4)"
        for before, leg in zip([None, *self.legs], self.legs):
            if not leg.state.is_lost:
                assert leg.epoch == self.epoch, "the epoch was not announced (I5)"
                sources = () if before is None else (before.peer_id,)
                assert set(sources) <= set(leg.sources), "the sources are of another route (I9)"


class Do(Enum):
    """Actions that need no more to be said."""

    OPEN_ROUTE = "reserve hops for all blocks, and feed them from the client's own log"
    REBUILD = "give up all hops: their rows are unknown or cannot be handed on"
    RUN = "run the pieces of the step"
    COPY = "send the replacements of hops that serve what they lack, while steps go on"
    SWITCH = "send them the rest, and let them take over before the next step"


@dataclass(frozen=True, slots=True)
class Redial:
    """Open new streams to these legs."""

    legs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Reserve hops in the place of legs [start, end). During a step these are lost: fill the hops
    and switch over. Between two steps they serve on: COPY and SWITCH follow.
    """

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


Action = Do | Redial | Replace | Wait | Raise


def next_action(state: SessionState, config: FailoverConfig, now: float) -> Action | None:
    """The next action; None: there is nothing to do between two steps. ``now``: s, monotonic."""
    step, legs = state.step, state.legs
    if step is None:
        return _between_steps(state, config, now)
    if state.is_closed:
        return Raise(SessionClosed("The session was closed.", hint="Open a new one."))
    broken = []
    for index, leg in enumerate(legs):
        if leg.state.error is None or leg.state.is_booked:
            continue
        reaction = decide(leg.state.error, step.history).reaction
        if reaction is Reaction.RAISE:
            return Raise(leg.state.error)
        if reaction is Reaction.RETRY and leg.state.status is LegStatus.BROKEN:
            broken.append(index)
    if broken and not state.has_diverged:
        return Redial(tuple(broken))
    if state.failure is not None:
        history = replace(step.history, now=now)
        return _wait(state, decide(state.failure, history), config.look_again_seconds)
    if step.num_repairs > config.max_repairs and step.last_error is not None:
        return Raise(step.last_error)
    start, end = _first_run(legs, lambda leg: leg.state.error is not None)
    from_log = state.has_diverged or not legs or (start == 0 and end > 0)
    if from_log and step.inputs.is_dropped:
        return Raise(_not_kept())
    limit, longest = state.max_step_tokens, max((p.num_tokens for p in step.pieces), default=0)
    is_too_long = bool(legs) and start == end and 0 < limit < longest
    if state.has_diverged or is_too_long:
        return Do.REBUILD
    if not legs:
        return Do.OPEN_ROUTE
    return Replace(start, end) if start < end else Do.RUN


def _wait(state: SessionState, decision: Decision, look_again_seconds: float) -> Action:
    """No server was found: how long to wait for one, or whether to give up."""
    assert state.failure is not None
    if decision.reaction is not Reaction.WAIT:
        return Raise(state.failure)
    seconds = min(decision.max_pause_seconds, look_again_seconds)
    # No other server has these blocks. Only now are lost hops called although they are avoided.
    # After a rebuild they would be of no use.
    indices = range(0 if state.has_diverged else len(state.legs))
    return Wait(seconds, tuple(i for i in indices if state.legs[i].state.may_hold_rows))


def _between_steps(state: SessionState, config: FailoverConfig, now: float) -> Action | None:
    """Migration; a loss waits for the next step, which repairs it."""
    legs, migration = state.legs, state.migration
    is_hurt = state.has_diverged or any(leg.state.is_lost for leg in legs)
    start, end = _first_run(legs, lambda leg: leg.state.migrates)
    if state.is_closed or is_hurt or start == end:
        return None
    if migration is None:
        seconds = state.migrate_at - now
        return Wait(seconds) if seconds > 0 else Replace(start, end)
    missing = max(migration.have.missing(state.confirmed.lengths), default=0)
    is_little = missing <= config.migration_final_tokens
    if is_little or migration.num_copies >= config.migration_max_copies:
        return Do.SWITCH
    return Do.COPY


def _first_run(legs: Sequence[HopSession], has: Callable[[HopSession], bool]) -> tuple[int, int]:
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
