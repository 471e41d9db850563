"""The inputs of a pass, and what its forward saves for its backward.

Only the compute thread uses saved activations. Knows no peers, no messages and no clock.
"""

from dataclasses import dataclass, field

from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.training.chunks import RowChunk
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """The inputs as they were received: hidden [sum(counts), H]; prompts [len(blocks), 1 or rows,
    P, H], added on entering each block; taps: the blocks whose outputs are wanted, too.
    """

    blocks: BlockSpan
    counts: tuple[int, ...]
    hidden: Tensor
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    taps: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def num_bytes(self) -> int:
        return self.hidden.nbytes + (0 if self.prompts is None else self.prompts.nbytes)


@dataclass(slots=True, eq=False)
class ChunkActivations:
    """One chunk on its way through some blocks.

    entry: [n, H], before ``blocks``. outputs: [1, n, H] of each block, with their autograd graph;
    None if that is not kept. prompts: for each block [1 or rows, P, H]. num_bytes: the graph's.
    """

    blocks: BlockSpan
    entry: Tensor
    prompts: list[Tensor] | None = None
    adapter: Adapter | None = None
    outputs: list[Tensor] | None = None
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class SavedActivations:
    """Each chunk of a pass with its activations from first block to last.

    Counts in ``budget`` from creation until ``drop``.
    """

    inputs: PassInputs
    budget: ActivationBudget
    chunks: list[tuple[RowChunk, list[ChunkActivations]]] = field(default_factory=list)
    is_dropped: bool = False

    def __post_init__(self) -> None:
        self.budget.take(self.inputs.num_bytes)

    def drop(self) -> None:
        """Release everything. May be called repeatedly."""
        if self.is_dropped:
            return
        self.is_dropped = True
        self.budget.give_back(self.inputs.num_bytes)
        for _, parts in self.chunks:
            for part in parts:
                self.forget(part)
        self.chunks = []

    def forget(self, part: ChunkActivations) -> None:
        """Release the graph of one part."""
        part.outputs = None
        self.budget.give_back(part.num_bytes)
        part.num_bytes = 0
