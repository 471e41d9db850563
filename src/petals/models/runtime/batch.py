"""The batch context: how data of single sessions reaches modules inside the model's own forward.

A step is a list of segments; each is a run of consecutive tokens of one row. Their hidden states
are packed into one tensor [1, total, H], segment after segment, without padding. transformers
passes nothing about sessions to attention, so the context is kept per thread while the forward
runs. It says which tokens belong to which segment, which block is running and which segments are
active in it; attention, cache, prompts, adapters and taps read it. ``SpanCache`` is the cache of
that forward: it writes the keys and values of each segment to the segment's row. Knows no
architecture, pools, sessions or networks.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.kv_layout import KVRow
from petals.models.runtime.recurrent import RecurrentRow
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
    rope_lengths: the rope length of each token (``runtime.rope_lengths``); None: the segment is a
    whole forward.
    taps: blocks (numbers in the whole model) whose outputs are wanted, too.
    tapped: after the run, the output [n, H] of each block in ``taps``.
    """

    hidden: torch.Tensor
    blocks: BlockSpan
    row: KVRow | None = None
    start: int = 0
    adapter: Adapter | None = None
    prompts: Sequence[torch.Tensor] | torch.Tensor | None = None
    rope_lengths: tuple[int, ...] | None = None
    taps: tuple[int, ...] = ()
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.hidden.shape[0]

    @property
    def given_rope_lengths(self) -> tuple[int, ...]:
        """The rope length of each token."""
        if self.rope_lengths is not None:
            return self.rope_lengths
        return (self.end,) * self.hidden.shape[0]


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
        self.plans = self._plan()
        """By the number of the block in the whole model; blocks that no segment uses have none."""

    def _plan(self) -> dict[int, BlockPlan]:
        plans: dict[int, BlockPlan] = defaultdict(BlockPlan)
        for part in self.parts:
            segment = part[0]
            for block in range(segment.blocks.start, segment.blocks.end):
                plan = plans[block]
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

    def rope_lengths(self) -> list[int]:
        """The rope lengths of the packed tokens [total]."""
        return [length for segment in self.segments for length in segment.given_rope_lengths]

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


class SpanCache(Cache):
    """The ``Cache`` that the model's own forward uses while a batch runs.

    When a block calls ``update``, the keys and values of each segment are written to the row of the
    segment. What ``update`` returns depends on the block. Where attention gets the very tensors
    that were written (``BlockTraits.direct``), the new tokens are returned as they are and
    attention reads the rows from the context, without a copy. Elsewhere the block transforms the
    past first (MLA expands its latent vectors), so the rows of all segments are returned, one after
    another.

    direct: for each block, whether attention may read the rows itself. num_states: recurrent states
    per block, as the config says.
    """

    def __init__(
        self, context: BatchContext, num_layers: int, direct: list[bool], num_states: int
    ) -> None:
        super().__init__(layers=[])
        self._context = context
        self._num_layers = num_layers
        self._direct = direct
        self._num_states = num_states

    def __len__(self) -> int:
        return self._num_layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, total, width] to the rows of the segments active in this block.

        Returns keys and values [1, heads, tokens, width] for attention: the new tokens (direct), or
        the rows of all active segments.
        """
        context = self._context
        block = context.block
        kept = []
        for segment, first, last in context.active:
            key = key_states[0].narrow(1, first, last - first)
            value = value_states[0].narrow(1, first, last - first)
            if segment.row is not None:
                key, value = segment.row.append(block, segment.start, key, value)
            kept.append((key, value))
        if context.packed and self._direct[block - context.first_block]:
            context.kv = kept
            return key_states, value_states
        if len(kept) == 1:
            return kept[0][0].unsqueeze(0), kept[0][1].unsqueeze(0)
        keys = torch.cat([key for key, _ in kept], dim=1)
        values = torch.cat([value for _, value in kept], dim=1)
        return keys.unsqueeze(0), values.unsqueeze(0)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Tokens before this step. With several segments and a layer: [total], one per token.

        A block that asks for a layer's length (Llama 4) computes ``arange(total) + length`` as its
        positions; the tensor makes these the positions in the rows.
        """
        segments = self._context.segments
        if layer_idx is None or len(segments) == 1:
            return segments[0].start
        count = torch.arange(self._context.total, device=self._context.device)
        return self._context.positions()[0] - count

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._context.segments[0].start

    # The methods below are called by the forwards of transformers and describe the cache to them.

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        past = 0 if self._context.packed else self._context.segments[0].start
        return past + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self._context.segments[0].start > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    @cached_property
    def _recurrent(self) -> RecurrentRow:
        """The states of the only segment: recurrent blocks are not packed."""
        row = self._context.segments[0].row
        kept = row.recurrent if row is not None else None
        return kept if kept is not None else RecurrentRow(self._context.total)

    def _state(self) -> LinearAttentionLayer:
        return self._recurrent.state(self._context.block, self._num_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = self._state()
        return state.conv_states[state_idx] if state.has_previous_state[state_idx] else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._state().update_conv_state(conv_states, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = self._state()
        return state.recurrent_states[state_idx] if state.has_previous_state[state_idx] else None

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._state().update_recurrent_state(recurrent_states, state_idx, **kwargs)
