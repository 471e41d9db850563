"""The state of one session: its hops, its rows and its step, with one owner and one lock.

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
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

from torch import Tensor

from petals.client.routing.failure_policy import History
from petals.client.session.actions import LegStatus, Situation
from petals.client.session.hop import HopSession
from petals.client.session.types import ReplicaProgress, StepPiece
from petals.errors import PetalsError
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.types import BlockSpan, Hop, PeerId


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
        """Make pieces of what remains, of at most ``max_tokens`` tokens (0: no limit)."""
        reorder, self.pieces = self.reorder, []
        for part in self.rest.parts(max_tokens):
            self.pieces.append(StepPiece(next(ids), part, reorder))
            reorder = None

    def settle(self) -> bool:
        """Take the pieces that are done, from the first on, out of what remains. True if any."""
        num_outputs = len(self.outputs)
        while self.pieces and self.pieces[0].output is not None:
            piece = self.pieces.pop(0)
            assert piece.output is not None
            self.outputs.append(piece.output)
            self.inputs.append(piece.rows.counts, piece.rows.hidden)
            self.reorder, self.server_rows = None, len(piece.rows.counts)
            ends = [start + number for start, number in zip(self.rest.starts, self.rest.counts)]
            starts = self.inputs.lengths
            counts = tuple(end - start for end, start in zip(ends, starts))
            self.rest = RowSlices(starts, counts, self.rest.hidden[piece.num_tokens :])
        return len(self.outputs) > num_outputs


@dataclass(slots=True, eq=False)
class SessionMigration:
    """``hops`` are to take the place of the draining ``old`` ones.

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
    in the order of their refusals. failure: why the last search for servers for the
    blocks ``sought`` found none.
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
    sought: BlockSpan = BlockSpan(0, 0)
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

    def begin(self, step: PendingStep) -> None:
        """A step begins, which first reorders and cuts the rows."""
        self.step, self.failure = step, None
        self.excluded.clear()
        if self.migration is not None:
            self.migration.have = self.migration.have.after(step.reorder, step.rest.starts)

    def situation(self, now: float) -> Situation:
        """What the next action depends on. ``now``: s, monotonic."""
        step, migration = self.step, self.migration
        longest = max((piece.num_tokens for piece in step.pieces), default=0) if step else 0
        limit = self.max_step_tokens
        missing = 0
        if migration is not None and step is None:
            missing = max(migration.have.missing(self.confirmed.lengths), default=0)
        return Situation(
            legs=tuple(leg.state for leg in self.legs),
            is_closed=self.is_closed,
            has_diverged=self.has_diverged,
            can_feed=step is None or not step.inputs.is_dropped,
            fits=not limit or longest <= limit,
            failure=self.failure,
            num_repairs=0 if step is None else step.num_repairs,
            last_error=None if step is None else step.last_error,
            history=None if step is None else replace(step.history, now=now),
            num_copies=None if migration is None else migration.num_copies,
            missing_tokens=missing,
            migrate_at=self.migrate_at,
        )

    def switch(self, old: Sequence[HopSession], hops: Sequence[HopSession]) -> None:
        """Put ``hops`` in the place of ``old`` legs and begin an epoch (I5); the first hops of a
        route join in the present one.
        """
        start = self.legs.index(old[0]) if old else 0
        self.epoch += bool(self.legs)
        self.legs[start : start + len(old)] = hops
        self.joining = [hop for hop in self.joining if hop not in hops]

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
            if leg.state.status in (LegStatus.CONNECTED, LegStatus.DRAINING):
                assert leg.epoch == self.epoch, "the epoch was not announced (I5)"
                sources = () if before is None else (before.peer_id,)
                assert set(sources) <= set(leg.sources), "the sources are of another route (I9)"
