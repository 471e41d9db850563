"""The batch context: how data of single sessions reaches modules inside the model's own forward.

A step is a list of segments; each is a run of consecutive tokens of one row. Their hidden states
are packed into one tensor [1, total, H], segment after segment, without padding. transformers
passes nothing about sessions to attention, so the context is kept per thread while the forward
runs. It says which tokens belong to which segment, which block is running and which segments are
active in it; attention, cache, prompts, adapters and taps read it. Knows nothing of pools, sessions
or networks.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.kv_layout import KVRow
from petals.types import BlockSpan


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive tokens of one row that pass through some blocks.

    hidden: [n, H], the states that enter ``blocks.start``.
    start: position of the first token in its row.
    row: where the keys and values are kept; None for a pass without cache (``start`` is then 0).
    adapter: added to the matrices of these blocks for the tokens of this segment only.
    prompts: [len(blocks), P, H] or one [P, H] per block, added to positions 0..P-1 where they enter
    that block.
    taps: blocks (numbers in the whole model) whose outputs are wanted, too.
    tapped: after the run, the output [n, H] of each block in ``taps``.
    """

    hidden: torch.Tensor
    blocks: BlockSpan
    row: KVRow | None = None
    start: int = 0
    adapter: Adapter | None = None
    prompts: Sequence[torch.Tensor] | torch.Tensor | None = None
    taps: tuple[int, ...] = ()
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.hidden.shape[0]


TokenRange = tuple[Segment, int, int]
"""A segment and its range of tokens [first, last) in the packed batch."""


@dataclass(slots=True, eq=False)
class BlockPlan:
    """The segments of one block, in packed order.

    active: those whose blocks include it; of these ``entering`` start here, ``leaving`` end here,
    ``prompted`` have prompts and ``tapped`` want its output.
    """

    active: list[TokenRange] = field(default_factory=list)
    entering: list[TokenRange] = field(default_factory=list)
    prompted: list[TokenRange] = field(default_factory=list)
    leaving: list[TokenRange] = field(default_factory=list)
    tapped: list[TokenRange] = field(default_factory=list)


class BatchContext:
    """One forward over packed segments.

    packed: whether attention is ``PACKED``; otherwise the model's own attention runs and there is
    one segment. block_outputs: if given, the output [1, total, H] of each block is appended to it.

    State during the forward: ``block`` (number of the running block), ``active`` (its segments),
    ``kv`` (keys and values of the active segments, passed from the cache to attention), ``memo``
    (masks of this step), ``on_attention`` (set by a probe; called with the key and value that
    attention gets). Afterwards ``outputs`` holds [n, H] for each segment.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        span: BlockSpan,
        packed: bool,
        block_outputs: list[torch.Tensor] | None = None,
    ) -> None:
        self.segments = segments
        self.packed = packed
        self.has_adapters = any(segment.adapter is not None for segment in segments)
        self.block_outputs = block_outputs
        self.first_block = span.start
        self.parts: list[TokenRange] = []
        self.total = 0
        for segment in segments:
            first, self.total = self.total, self.total + segment.hidden.shape[0]
            self.parts.append((segment, first, self.total))
        self.device = segments[0].hidden.device
        self.block = span.start
        self.active = self.parts
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.memo: dict[Any, Any] = {}
        self.on_attention: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.outputs: list[torch.Tensor] = [segment.hidden for segment in segments]
        self.plans = self._plan(span)

    def _plan(self, span: BlockSpan) -> list[BlockPlan | None]:
        plans: list[BlockPlan | None] = [None] * len(span)
        for part in self.parts:
            segment = part[0]
            for block in range(segment.blocks.start, segment.blocks.end):
                plan = plans[block - span.start]
                if plan is None:
                    plan = plans[block - span.start] = BlockPlan()
                plan.active.append(part)
                if block == segment.blocks.start:
                    plan.entering.append(part)
                if block == segment.blocks.end - 1:
                    plan.leaving.append(part)
                if segment.prompts is not None:
                    plan.prompted.append(part)
                if block in segment.taps:
                    plan.tapped.append(part)
        return plans

    def packed_hidden(self) -> torch.Tensor:
        """Zeros [1, total, H], passed to the model's forward as its embeddings.

        Segments are put in place by ``enter`` at the blocks where they start. What a model does to
        its embeddings before the first block (some scale them in place) must not change them.
        """
        like = self.segments[0].hidden
        return torch.zeros((1, self.total, like.shape[1]), dtype=like.dtype, device=like.device)

    def positions(self) -> torch.Tensor:
        """Positions [1, total] (int64) of the packed tokens in their rows."""
        pieces = [
            torch.arange(segment.start, segment.end, device=self.device)
            for segment in self.segments
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).unsqueeze(0)

    def enter(self, plan: BlockPlan, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [1, total, H] with the states of entering segments put in, prompts added."""
        changed = {part[1]: part[0].hidden for part in plan.entering}
        for segment, first, last in plan.prompted:
            states = changed.get(first, hidden[0, first:last])
            changed[first] = _with_prompt(segment, states, self.block)
        if not changed:
            return hidden
        rows = []
        for segment, first, last in self.parts:
            if first in changed:
                rows.append(changed[first])
            elif self.block < segment.blocks.start:
                # Not entered yet: earlier blocks have computed on these rows. Their values are
                # never used; zeros keep them from growing from block to block.
                rows.append(torch.zeros_like(segment.hidden))
            else:
                rows.append(hidden[0, first:last])
        # A single row is cloned as well: a block may write to its input, which the caller owns.
        return (torch.cat(rows) if len(rows) > 1 else rows[0].clone()).unsqueeze(0)

    def leave(self, plan: BlockPlan, hidden: torch.Tensor) -> None:
        """Store the output [1, total, H] of the running block where it is wanted."""
        if self.block_outputs is not None:
            self.block_outputs.append(hidden)
        for segment, first, last in plan.tapped:
            segment.tapped[self.block] = hidden[0, first:last].clone()
        for part in plan.leaving:
            self.outputs[self.parts.index(part)] = hidden[0, part[1] : part[2]]


def _with_prompt(segment: Segment, states: torch.Tensor, block: int) -> torch.Tensor:
    """``states`` [n, H] plus the part of the block's prompt at the positions of the segment."""
    assert segment.prompts is not None
    prompt = segment.prompts[block - segment.blocks.start][segment.start : segment.end]
    num_prompted = prompt.shape[0]
    if num_prompted == 0:
        return states
    prompted = states[:num_prompted] + prompt.to(states.dtype)
    return torch.cat([prompted, states[num_prompted:]])


_running = threading.local()


def current() -> BatchContext | None:
    """The context of the forward that runs in this thread; None outside of one."""
    return getattr(_running, "context", None)


@contextmanager
def activate(context: BatchContext) -> Iterator[None]:
    """Make ``context`` the current one of this thread inside the with block."""
    before = current()
    _running.context = context
    try:
        yield
    finally:
        _running.context = before
