"""What passes in both directions share: a walk through some blocks, one unit at a time.

A walk stops before each unit and is told how large it may be. Between units only the states between
blocks are held, and what autograd needs where there is room for it. All of this belongs to the
compute thread. Knows no peers, no messages and no clock.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Mode
from petals.server.compute.activation_budget import ActivationBudget, Meter
from petals.server.compute.device import DeviceContext, place_states
from petals.server.training import chunks
from petals.server.training.chunks import FORWARD_WORTH, RowChunk
from petals.types import BlockSpan

Units = Generator[None, int, None]
"""Stops before each unit and is sent the room for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """What goes in, as it came: hidden [sum(counts), H], prompts [len(blocks), 1 or rows, P, H]."""

    blocks: BlockSpan
    counts: tuple[int, ...]
    hidden: Tensor
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    taps: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.hidden.nbytes + (0 if self.prompts is None else self.prompts.nbytes)


@dataclass(slots=True, eq=False)
class ChunkActivations:
    """A strip's way through some blocks.

    entry: [n, H] states before ``blocks``. outputs: [1, n, H] of each block, with their graph; None
    if it was not kept. prompts: for each block [1 or rows, P, H].
    """

    blocks: BlockSpan
    entry: Tensor
    prompts: list[Tensor] | None = None
    adapter: Adapter | None = None
    outputs: list[Tensor] | None = None
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class SavedActivations:
    """All that the way back needs: each strip with its stages. ``drop`` gives the memory back."""

    inputs: PassInputs
    allowance: ActivationBudget
    strips: list[tuple[RowChunk, list[ChunkActivations]]] = field(default_factory=list)
    is_dropped: bool = False

    def __post_init__(self) -> None:
        self.allowance.take(self.inputs.num_bytes)

    def drop(self) -> None:
        """Let everything go. Idempotent."""
        if self.is_dropped:
            return
        self.is_dropped = True
        self.allowance.give_back(self.inputs.num_bytes)
        for _, stages in self.strips:
            for stage in stages:
                self.forget(stage)
        self.strips = []

    def forget(self, stage: ChunkActivations) -> None:
        """Let the graph of one stage go."""
        stage.outputs = None
        self.allowance.give_back(stage.num_bytes)
        stage.num_bytes = 0


class ChunkedPass(ABC):
    """What both directions share: inputs on the device, strips, runs of single units."""

    def __init__(self, place: DeviceContext, inputs: PassInputs) -> None:
        self.place = place
        self.inputs = inputs
        self.num_tokens = sum(inputs.counts)
        self.num_blocks = len(place.runner.blocks)
        self.room = 0
        self.cost_tokens = 0
        self.units = self._units()

    @abstractmethod
    def _units(self) -> Units: ...

    @abstractmethod
    def give_up(self) -> None:
        """Let go what is kept for the way back."""

    def place_inputs(self) -> None:
        """Look at the inputs and bring them to the device. Raises BadInput."""
        inputs, place = self.inputs, self.place
        self.hidden = place_states(place, inputs.hidden)
        self.prompts = None if inputs.prompts is None else place_states(place, inputs.prompts)

    def next_strip(self, begun: RowChunk | None) -> RowChunk | None:
        counts = self.inputs.counts
        packed = self.place.runner.mode is Mode.PACKED
        most = chunks.tokens_of_strip(self.room, self.num_blocks) if packed else 0
        return chunks.next_strip(counts, begun, most)

    def fitting(self, strip: RowChunk, first: int) -> BlockSpan:
        """The next blocks from ``first`` that fit into the room."""
        most = chunks.blocks_within(self.room, strip.num_tokens, FORWARD_WORTH, self.num_blocks)
        return BlockSpan(first, min(self.inputs.blocks.end, first + most))

    def count(self, strip: RowChunk, num_blocks: int, cost_tokens: int) -> None:
        self.cost_tokens += chunks.worth_of(
            strip.num_tokens, num_blocks, cost_tokens, self.num_blocks
        )

    def stage(self, strip: RowChunk, blocks: BlockSpan, states: Tensor) -> ChunkActivations:
        prompts = None
        if self.prompts is not None:
            start = blocks.start - self.inputs.blocks.start
            mine = self.prompts[start : start + len(blocks)]
            if mine.shape[1] > 1:
                mine = mine[:, strip.rows.start : strip.rows.stop]
            prompts = list(mine.unbind())
        return ChunkActivations(blocks, states, prompts, self.inputs.adapter)

    def run(self, strip: RowChunk, stage: ChunkActivations, taps: dict[int, Tensor]) -> Tensor:
        """Run a stage without autograd. Returns its output [n, H]; fills ``taps``."""
        wanted = tuple(block for block in taps if block in stage.blocks)
        segments = list(self._segments(strip, stage, wanted))
        outputs = self.place.runner.run(segments)
        for block in wanted:
            tapped = torch.cat([segment.tapped[block] for segment in segments])
            taps[block][strip.first : strip.last] = tapped
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def trace(self, strip: RowChunk, stage: ChunkActivations) -> Tensor:
        """Run a stage and keep its graph. Returns its output [n, H], apart from that."""
        # What has run in inference mode must be copied before autograd may keep it.
        copied = stage.entry.clone() if stage.entry.is_inference() else stage.entry.detach()
        stage.entry = copied.requires_grad_()
        if stage.prompts is not None:
            stage.prompts = [part.detach().requires_grad_() for part in stage.prompts]
        if stage.adapter is not None:
            stage.adapter = stage.adapter.leaves(stage.blocks)
        meter = Meter(self.place.runner.weights)
        with meter.running():
            stage.outputs = self.place.runner.trace(list(self._segments(strip, stage)))
        for states in (stage.entry, *stage.outputs):
            meter.note(states)
        stage.num_bytes = meter.num_bytes
        self.place.allowance.take_graph(meter.num_bytes, strip.num_tokens, len(stage.blocks))
        return stage.outputs[-1].detach()[0]

    def _segments(
        self, strip: RowChunk, stage: ChunkActivations, taps: tuple[int, ...] = ()
    ) -> Iterator[Segment]:
        first = 0
        for index, row in enumerate(strip.rows):
            count = self.inputs.counts[row]
            if not count:
                continue
            prompts = None
            if stage.prompts is not None:
                prompts = [part[index if len(part) > 1 else 0] for part in stage.prompts]
            yield Segment(
                hidden=stage.entry[first : first + count],
                blocks=stage.blocks,
                adapter=stage.adapter,
                prompts=prompts,
                taps=taps,
            )
            first += count
