"""Values that the parts of a session pass to each other. Knows no channels and no peers' states."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.token_log import RowSlices
from petals.types import BlockSpan, PeerId


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
    """What a session asks of every one of its hops.

    hidden_size: width of the client's hidden states. max_length: tokens of a row; None: what the
    server allows, and cache is taken as the rows grow. active_adapter: one of the servers' own,
    used where ``tuning`` brings none. epoch: the one in which the hop joins.
    """

    model: str
    num_rows: int
    hidden_size: int
    max_length: int | None
    dtype: torch.dtype = torch.float32
    active_adapter: str | None = None
    tuning: Tuning = Tuning()
    epoch: int = 0

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that a hop needs in each block; 0 if the cache is to grow."""
        return (self.max_length or 0) * self.num_rows

    def adapter_name(self, blocks: BlockSpan) -> str | None:
        """The adapter that a server of ``blocks`` is to apply."""
        if self.tuning.adapter is None:
            return self.active_adapter
        own = self.tuning.adapter.within(blocks)
        return None if own is None else own.digest


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


@dataclass(frozen=True, slots=True)
class HopNeighbours:
    """The servers that a hop receives states from and forwards them to, beside the client.

    ``kv_donor`` is the server that the hop replaces, if it is to send its keys and values.
    """

    before: PeerId | None = None
    after: PeerId | None = None
    kv_donor: PeerId | None = None

    @property
    def sources(self) -> tuple[PeerId, ...]:
        """The peers that the hop accepts states from."""
        return tuple(peer for peer in (self.before, self.kv_donor) if peer is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTimeouts:
    """Seconds to wait for a stream, for one answer, for room in the server's cache, for a sign of
    life while an answer is due, and for the confirmation of a close.
    """

    connect_seconds: float
    request_seconds: float
    alloc_seconds: float = 0.0
    silence_seconds: float
    close_seconds: float


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
