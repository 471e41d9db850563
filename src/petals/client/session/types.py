"""What a session asks of its hops, and what they say: the words between hop, path and recovery.

Plain values; knows no channels and no servers but by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan, PeerId, SessionId
from petals.wire.replies import StepResult


@dataclass(frozen=True, slots=True, eq=False)
class Tuning:
    """What a client's training adds to blocks that begin at ``first``.

    prompts: [blocks, P, H], for positions 0 to P-1 of every row, on entering each block.
    """

    first: int = 0
    prompts: Tensor | None = None
    adapter: Adapter | None = None

    def prompts_of(self, blocks: BlockSpan) -> tuple[Tensor, ...]:
        """The prompts that a server of ``blocks`` is given, if there are any."""
        if self.prompts is None:
            return ()
        return (self.prompts[blocks.start - self.first : blocks.end - self.first],)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What a session asks of every one of its hops."""

    session_id: SessionId
    model: str
    num_rows: int
    max_length: int | None
    """None: whatever the server allows, room taken as the rows grow."""
    dtype: torch.dtype = torch.float32
    active_adapter: str | None = None
    """One of the servers' own, used where ``tuning`` brings none."""
    tuning: Tuning = Tuning()
    epoch: int = 0

    @property
    def cache_tokens(self) -> int:
        """Room that a hop needs for the session in each block, in tokens; 0 if it is to grow."""
        return (self.max_length or 0) * self.num_rows

    def adapter_name(self, blocks: BlockSpan) -> str | None:
        """The adapter that a server of ``blocks`` is to apply."""
        if self.tuning.adapter is None:
            return self.active_adapter
        own = self.tuning.adapter.within(blocks)
        return None if own is None else own.digest


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """What a successor has of a session's rows: row r stands, as far as ``lengths[r]`` tokens, in
    its row ``rows[r]``.
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
        """Tokens of each row that it has not."""
        return tuple(length - held for length, held in zip(lengths, self.lengths, strict=True))


@dataclass(frozen=True, slots=True)
class HopNeighbours:
    """The servers that a hop takes states from and hands them to, where there are any beside us.

    ``kv_donor`` is the one whose place it takes, if that is to give it what its blocks keep.
    """

    before: PeerId | None = None
    after: PeerId | None = None
    kv_donor: PeerId | None = None

    @property
    def sources(self) -> tuple[PeerId, ...]:
        """Whom the hop may take anything from."""
        return tuple(peer for peer in (self.before, self.kv_donor) if peer is not None)


class Refill(Enum):
    """Why a step is sent: for its output, or to refill rows that were lost."""

    NO = "no"
    YES = "yes"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTimeouts:
    """How long to wait for a stream, for one answer, for room in the server's cache, and for a sign
    of life while something is pending.
    """

    connect_seconds: float
    request_seconds: float
    alloc_seconds: float = 0.0
    silence_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class StepCall:
    """One step as every hop gets it: row r runs ``counts[r]`` tokens from ``starts[r]``."""

    step_id: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    reorder: tuple[int, ...] | None = None
    refill: Refill = Refill.NO
    reordered: bool = False
    """The rows are refilled as the reorder of the step to follow leaves them."""

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(slots=True, eq=False)
class StepPiece:
    """A step under way. hidden: [tokens, H]; output: the same shape, once it has come."""

    call: StepCall
    hidden: Tensor
    output: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepReply:
    """What a hop said to a step."""

    result: StepResult
    tensors: list[Tensor]
