"""A pass of whole sequences as a job, in the part that both directions share.

A pass is cut (``chunks``) into row chunks and these into parts of some blocks each. ``run`` runs
one part, so that decode steps wait for one part only. Between parts a pass holds the states between
two blocks, and the autograd graphs that fit the activation budget. Knows no peers, no messages and
no clock.
"""

from abc import abstractmethod
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Mode
from petals.server.compute.activation_budget import Meter
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import ExclusiveJob
from petals.server.training import chunks
from petals.server.training.chunks import FORWARD_COST, RowChunk
from petals.server.training.saved_activations import ChunkActivations, PassInputs, SavedActivations
from petals.types import BlockSpan

T = TypeVar("T")
Parts = Generator[None, None, None]
"""Pauses between two parts; ends with the last part."""


class ChunkedPass(ExclusiveJob[T]):
    """One direction of a pass. ``saved``: the activations it owns, counted in the budget."""

    is_done = False

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.saved: SavedActivations | None = None
        self.budget_tokens = 0
        self._spent_tokens = 0
        self._parts = self._run_parts()

    @abstractmethod
    def _run_parts(self) -> Parts:
        """Run the pass; ``budget_tokens`` is what each part may cost."""

    def run(self, budget_tokens: int) -> int:
        """See Job."""
        self.budget_tokens = budget_tokens
        before = self._spent_tokens
        try:
            next(self._parts)
        except StopIteration:
            self.is_done = True
        # The next batch would wait for the device in any case, and the scheduler must know how long
        # the part has taken.
        self.device.synchronize()
        return self._spent_tokens - before

    def abort(self) -> None:
        """Release the activations and the states between parts."""
        self._parts.close()
        self._drop_saved()

    def _begin(self, device: DeviceContext, inputs: PassInputs) -> None:
        self.device = device
        self.inputs = inputs
        self.num_blocks = len(device.runner.blocks)

    def _put_inputs(self) -> None:
        """Move hidden and prompts to the device. Raises BadInput."""
        prompts = self.inputs.prompts
        self.hidden = self.device.put(self.inputs.hidden)
        self.prompts = None if prompts is None else self.device.put(prompts)

    def _drop_saved(self) -> None:
        if self.saved is not None:
            self.saved.drop()
            self.saved = None

    def _cost(self, num_tokens: int, num_blocks: int, cost: int) -> int:
        return chunks.cost_tokens(num_tokens, num_blocks, cost, self.num_blocks)

    def _spend(self, chunk: RowChunk, num_blocks: int, cost: int) -> None:
        self._spent_tokens += self._cost(chunk.num_tokens, num_blocks, cost)

    def _next_chunk(self, done: RowChunk | None) -> RowChunk | None:
        # Blocks that cannot run several rows at once get them one by one.
        is_packed = self.device.runner.mode is Mode.PACKED
        most = chunks.chunk_tokens(self.budget_tokens, self.num_blocks) if is_packed else 0
        return chunks.next_chunk(self.inputs.counts, done, most)

    def _next_blocks(self, chunk: RowChunk, first: int) -> BlockSpan:
        """The blocks from ``first`` that fit the budget."""
        most = chunks.blocks_within(
            self.budget_tokens, chunk.num_tokens, FORWARD_COST, self.num_blocks
        )
        return BlockSpan(first, min(self.inputs.blocks.end, first + most))

    def _part(self, chunk: RowChunk, blocks: BlockSpan, states: Tensor) -> ChunkActivations:
        """``chunk`` before ``blocks``, with what these add to it."""
        prompts = None
        if self.prompts is not None:
            start = blocks.start - self.inputs.blocks.start
            own = self.prompts[start : start + len(blocks)]
            if own.shape[1] > 1:
                own = own[:, chunk.rows.start : chunk.rows.stop]
            prompts = list(own.unbind())
        return ChunkActivations(blocks, states, prompts, self.inputs.adapter)

    def _infer(self, chunk: RowChunk, part: ChunkActivations, taps: dict[int, Tensor]) -> Tensor:
        """Run a part without autograd. Returns its output [n, H]; fills ``taps``."""
        wanted = tuple(block for block in taps if block in part.blocks)
        segments = list(self._segments(chunk, part, wanted))
        outputs = self.device.runner.run(segments)
        for block in wanted:
            tapped = torch.cat([segment.tapped[block] for segment in segments])
            taps[block][chunk.first : chunk.last] = tapped
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _trace(self, chunk: RowChunk, part: ChunkActivations) -> Tensor:
        """Run a part and keep its graph. Returns its output [n, H], detached from the graph."""
        # autograd may not save a tensor that was made in inference mode; a copy it may.
        entry = part.entry.clone() if part.entry.is_inference() else part.entry.detach()
        part.entry = entry.requires_grad_()
        if part.prompts is not None:
            part.prompts = [prompt.detach().requires_grad_() for prompt in part.prompts]
        if part.adapter is not None:
            part.adapter = part.adapter.leaves(part.blocks)
        meter = Meter(self.device.runner.weights)
        with meter.running():
            part.outputs = self.device.runner.trace(list(self._segments(chunk, part)))
        for states in (part.entry, *part.outputs):
            meter.note(states)
        part.num_bytes = meter.num_bytes
        budget = self.device.activation_budget
        budget.take_graph(meter.num_bytes, chunk.num_tokens, len(part.blocks))
        return part.outputs[-1].detach()[0]

    def _segments(
        self, chunk: RowChunk, part: ChunkActivations, taps: tuple[int, ...] = ()
    ) -> Iterator[Segment]:
        first = 0
        for index, row in enumerate(chunk.rows):
            count = self.inputs.counts[row]
            if not count:
                continue
            prompts = None
            if part.prompts is not None:
                prompts = [prompt[index if len(prompt) > 1 else 0] for prompt in part.prompts]
            yield Segment(
                hidden=part.entry[first : first + count],
                blocks=part.blocks,
                adapter=part.adapter,
                prompts=prompts,
                taps=taps,
            )
            first += count
