"""How a client's modules reach blocks: sessions that continue, whole sequences that do not.

The seam between what looks like a model and what looks like a network; tests put blocks of this
process behind it. Must not know models, servers or routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True, eq=False)
class PassCall:
    """What whole sequences are run with, beside their hidden states.

    counts: tokens of each row. prompts: [blocks run, 1 or rows, P, H], added to the first P tokens
    of every row on entering each block. taps: blocks (absolute) whose outputs are wanted, too.
    """

    counts: tuple[int, ...]
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PassOutput:
    """hidden, and what each tapped block put out: all [sum(counts), H]."""

    hidden: Tensor
    tapped: dict[int, Tensor] = field(default_factory=dict)


class SessionView(Protocol):
    """A KV cache on the servers, seen from outside."""

    position: int
    output_ids: Tensor | None
    past_key_values: Any

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def step(
        self, inputs: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None
    ) -> Tensor: ...

    def step_rows(
        self,
        hidden: Tensor,
        *,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
    ) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionCall:
    """What a session is opened with.

    Room for ``max_length`` tokens in each of ``num_rows`` rows; None: as they come. prompts:
    [blocks run, P, H], added to positions 0 to P-1 of every row on entering each block.
    """

    max_length: int | None = None
    num_rows: int | None = None
    prompts: Tensor | None = None
    adapter: Adapter | None = None


class BlockRunner(Protocol):
    """Runs consecutive blocks of one model."""

    @property
    def num_blocks(self) -> int: ...

    def open_session(self, blocks: BlockSpan, call: SessionCall) -> SessionView: ...

    def run_whole(self, blocks: BlockSpan, hidden: Tensor, call: PassCall) -> PassOutput:
        """Packed whole sequences [sum(counts), H] once; nothing is kept for later calls.

        Differentiable with respect to hidden, prompts and the adapter's tensors.
        """
        ...

    def sequence_manager(self, blocks: BlockSpan) -> Any: ...
