"""What a session asks of its servers. Knows no channels and no state of a session."""

from dataclasses import dataclass

import torch
from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan


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

    def adapter_of(self, blocks: BlockSpan) -> Adapter | None:
        """The part of the adapter that a server of ``blocks`` applies."""
        return None if self.adapter is None else self.adapter.within(blocks)


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """A reservation of this client at the same server, and the tokens of each of its rows, that a
    new one begins with.
    """

    session_id: bytes
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What a session asks of every one of its hops.

    hidden_size: width of the client's hidden states. max_length: tokens of a row; None: what the
    server allows, and cache is taken as the rows grow. active_adapter: one of the servers' own,
    used where ``tuning`` brings none. epoch: the one in which the hop joins. alloc_seconds: how
    long a full server may wait for room. fork: what a single hop begins with; None: with nothing.
    """

    model: str
    num_rows: int
    hidden_size: int
    max_length: int | None
    dtype: torch.dtype = torch.float32
    active_adapter: str | None = None
    tuning: Tuning = Tuning()
    epoch: int = 0
    alloc_seconds: float = 0.0
    fork: ForkPoint | None = None

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that a hop needs in each block; 0 if the cache is to grow."""
        return (self.max_length or 0) * self.num_rows

    def adapter_name(self, blocks: BlockSpan) -> str | None:
        """The adapter that a server of ``blocks`` is to apply."""
        own = self.tuning.adapter_of(blocks)
        if self.tuning.adapter is None:
            return self.active_adapter
        return None if own is None else own.digest
