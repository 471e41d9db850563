"""The seam between modules that look like a model and the swarm that runs its blocks.

``BlockRunner`` has the two calls that leave the module world: open a session, run whole sequences.
`RemoteSequential` uses the swarm's; tests put blocks of their own process there. Knows no models,
servers or routes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True, eq=False)
class PassCall:
    """What whole sequences are run with, besides their hidden states.

    counts: tokens of each row. prompts: [blocks, 1 or rows, P, H], added to the first P tokens of
    every row at the input of each block. taps: blocks, counted from the model's first, whose
    outputs are returned too.
    """

    counts: tuple[int, ...]
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PassOutput:
    """The output of the last block, and that of each tapped block: all [sum(counts), H]."""

    hidden: Tensor
    tapped: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockRunner:
    """The two calls that run blocks.

    open_rows: called like `SessionRows`, with (access, blocks, max_length=, num_rows=, tuning=).
    run_whole: called like `client.training.autograd.run_whole`, with (access, blocks, hidden,
    call).
    """

    open_rows: Callable[..., SessionRows]
    run_whole: Callable[[SwarmConnection, BlockSpan, Tensor, PassCall], PassOutput]
