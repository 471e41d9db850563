"""The batch context: the only road by which per-session things reach modules.

A step is a list of segments, each a run of consecutive tokens of one row. While the model's own
forward runs, the context says which tokens belong to whom, which block is running and who takes
part in it; attention, prompts and taps read it. Knows nothing of pools, sessions or networks.
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
    """Consecutive tokens of one row on their way through some blocks.

    hidden: [n, H] states entering ``blocks.start``; ``start`` is the position of the first token.
    row: where keys and values live; None for a pass without memory (``start`` is then 0).
    adapter: added to the matrices of these blocks, for this segment alone.
    prompts: for each block [P, H], added to positions 0..P-1 on entering it.
    taps: absolute blocks whose outputs, [n, H], are wanted in ``tapped`` after the run.
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
"""A segment and its token range [first, last) in the packed batch."""


@dataclass(slots=True, eq=False)
class BlockPlan:
    """Who takes part in one block, and what happens on its way in and out."""

    active: list[TokenRange] = field(default_factory=list)
    entering: list[TokenRange] = field(default_factory=list)
    prompted: list[TokenRange] = field(default_factory=list)
    leaving: list[TokenRange] = field(default_factory=list)
    tapped: list[TokenRange] = field(default_factory=list)


class BatchContext:
    """One packed forward: hidden [1, total, H], segment after segment.

    ``borders``, if given, gets the whole output of each block that runs.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        span: BlockSpan,
        packed: bool,
        borders: list[torch.Tensor] | None = None,
    ) -> None:
        self.segments = segments
        self.packed = packed
        self.has_adapters = any(segment.adapter is not None for segment in segments)
        self.borders = borders
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
        self.observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None
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
        """Zeros [1, total, H] for the model's forward to start with.

        Blocks take their inputs from ``enter``; whatever the model does to embeddings before, it
        does to these (some scale them in place).
        """
        like = self.segments[0].hidden
        return torch.zeros((1, self.total, like.shape[1]), dtype=like.dtype, device=like.device)

    def positions(self) -> torch.Tensor:
        """[1, total] int64 positions of the packed tokens."""
        pieces = [
            torch.arange(segment.start, segment.end, device=self.device)
            for segment in self.segments
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).unsqueeze(0)

    def enter(self, plan: BlockPlan, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [1, total, H] with the states of entering segments and with prompts added."""
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
                rows.append(torch.zeros_like(segment.hidden))
            else:
                rows.append(hidden[0, first:last])
        # One row is copied too: a block may write into its input, which is the caller's.
        return (torch.cat(rows) if len(rows) > 1 else rows[0].clone()).unsqueeze(0)

    def leave(self, plan: BlockPlan, hidden: torch.Tensor) -> None:
        """Take the outputs [1, total, H] of one block for those who leave it or look at it."""
        if self.borders is not None:
            self.borders.append(hidden)
        for segment, first, last in plan.tapped:
            segment.tapped[self.block] = hidden[0, first:last].clone()
        for part in plan.leaving:
            self.outputs[self.parts.index(part)] = hidden[0, part[1] : part[2]]


def _with_prompt(segment: Segment, states: torch.Tensor, block: int) -> torch.Tensor:
    assert segment.prompts is not None
    prompt = segment.prompts[block - segment.blocks.start][segment.start : segment.end]
    num_prompted = prompt.shape[0]
    if num_prompted == 0:
        return states
    prompted = states[:num_prompted] + prompt.to(states.dtype)
    return torch.cat([prompted, states[num_prompted:]])


_running = threading.local()


def current() -> BatchContext | None:
    """The context of the forward that runs in this thread, or None outside ``Span.run``."""
    return getattr(_running, "context", None)


@contextmanager
def activate(context: BatchContext) -> Iterator[None]:
    """Make ``context`` the current one of this thread."""
    before = current()
    _running.context = context
    try:
        yield
    finally:
        _running.context = before
