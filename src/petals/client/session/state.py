"""One session on its course: the path it has now, its epoch, and the rows that servers hold.

What recovery and hand-over share, and how rows get to hops that lack them. Decides nothing.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from torch import Tensor

from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession
from petals.client.session.input_log import InputLog, RowSlices, cut
from petals.client.session.pending import Refilling
from petals.client.session.pipeline import HopPipeline
from petals.client.session.types import Refill, ReplicaProgress, SessionSpec, StepCall, StepPiece
from petals.errors import PetalsError
from petals.types import PeerId

_SENT_AHEAD = 8
"""Parts of a replay that a server may have waiting."""


@dataclass(slots=True, eq=False)
class SessionState:
    """The pipeline of a session, its epoch, and the rows that its servers hold.

    ``told``: the rows that every server is known to hold between two steps. ``servers_diverged``: a
    failed step may have changed them, so that the route must be rebuilt. ``turn`` is held while a
    step runs or the hops are changed.
    """

    swarm: SwarmState
    terms: SessionSpec
    path: HopPipeline | None = None
    epoch: int = 0
    told: InputLog = field(default_factory=lambda: InputLog(0))
    servers_diverged: bool = False
    step_ids: Iterator[int] = field(default_factory=lambda: count(1))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def piece_tokens(self, hops: Sequence[HopSession]) -> int:
        """Tokens of a piece: what these servers take, and less where hops can share the work.

        0: no limit.
        """
        limits = [hop.info.max_batch_tokens for hop in hops]
        if self.path is not None and len(self.path.hops) > 1:
            limits.append(self.swarm.config.prefill_chunk_tokens)
        return min((limit for limit in limits if limit), default=0)


async def refill_from_us(
    path: HopPipeline,
    refilling: Refilling,
    parts: Sequence[RowSlices],
    *,
    held: ReplicaProgress | None = None,
    reordered: bool = False,
) -> None:
    """Feed ``parts`` of the session's own inputs to hops that stand at the beginning.

    ``held`` is what these have already; None: nothing in as many rows. Raises what
    ``HopPipeline.refill`` raises.
    """

    async def send(some: Sequence[RowSlices]) -> None:
        for part in some:
            call = StepCall(
                refilling.step_id,
                part.starts,
                part.counts,
                reorder=held.rows if held is not None and part is parts[0] else None,
                refill=Refill.LAST if part is some[-1] else Refill.YES,
                reordered=reordered,
            )
            await refilling.hops[0].send(call, part.hidden, refilling.next_hops)

    for at in range(0, len(parts), _SENT_AHEAD):
        await path.refill(refilling, partial(send, parts[at : at + _SENT_AHEAD]))


def in_pieces(part: RowSlices | None, limit: int) -> list[RowSlices]:
    """``part``, if there is anything, in parts of at most ``limit`` tokens."""
    return [] if part is None else list(cut(part, limit))


@dataclass(slots=True)
class PendingStep:
    """One step of the session, cut into pieces for the path that is to run it.

    inputs: the rows as the step finds them; pieces that are done are added to it. ``rest`` is what
    remains, ``reorder`` what servers must do to their rows first.
    """

    inputs: InputLog
    rest: RowSlices
    reorder: tuple[int, ...] | None
    cuts_rows: bool
    """It reorders rows or rolls some back: if it fails, the servers' rows are not ours any more."""
    server_rows: int
    """Rows that servers have before the reorder."""
    pieces: list[StepPiece] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    num_refusals: int = 0
    reconnected: set[PeerId] = field(default_factory=set)
    forgetful: set[PeerId] = field(default_factory=set)
    """Servers whose lease of the session ran out; each may say so once."""
    last_failure: PetalsError | None = None

    @property
    def needed_lengths(self) -> tuple[int, ...]:
        """Tokens that the step needs of every row that servers have before its reorder."""
        if self.reorder is None:
            return self.inputs.lengths
        lengths = [0] * self.server_rows
        for row, length in zip(self.reorder, self.inputs.lengths):
            lengths[row] = max(lengths[row], length)
        return tuple(lengths)

    def settle(self) -> None:
        """Take the pieces that are done, from the first on, out of what remains."""
        while self.pieces and self.pieces[0].output is not None:
            piece = self.pieces.pop(0)
            assert piece.output is not None
            self.outputs.append(piece.output)
            self.inputs.append(piece.call.counts, piece.hidden)
            self.reorder, self.server_rows = None, len(piece.call.counts)
            starts = self.inputs.lengths
            counts = tuple(
                start + number - now
                for start, number, now in zip(self.rest.starts, self.rest.counts, starts)
            )
            self.rest = RowSlices(starts, counts, self.rest.hidden[piece.call.num_tokens :])
