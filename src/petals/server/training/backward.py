"""The way back: gradients of inputs, prompts and adapters, along a kept trail or after going there
once more.

Knows no peers, no messages and no clock.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from petals.models.adapters.low_rank import LowRank, Slot
from petals.server.compute.device import DeviceContext, place_states
from petals.server.training import chunks
from petals.server.training.chunked_pass import (
    ChunkActivations,
    ChunkedPass,
    PassInputs,
    SavedActivations,
    Units,
)
from petals.server.training.chunks import BACKWARD_WORTH, FORWARD_WORTH, RowChunk
from petals.types import BlockSpan


class BackwardWalk(ChunkedPass):
    """Back through the blocks, along a trail or, without one, after going there once more.

    gradients: of the output and of each tap, [sum(counts), H]. hidden_gradient, prompts_gradient
    and adapter_gradients (of a and b of each slot) are what comes out.
    """

    def __init__(
        self,
        place: DeviceContext,
        inputs: PassInputs,
        gradients: Sequence[Tensor],
        trail: SavedActivations | None,
    ) -> None:
        super().__init__(place, inputs)
        self.is_recomputed = trail is None
        if trail is None:
            self.place_inputs()
        output, *taps = (place_states(place, gradient) for gradient in gradients)
        self.gradient, self.tap_gradients = output, dict(zip(inputs.taps, taps))
        self.trail = trail or SavedActivations(inputs, place.allowance)
        self.hidden_gradient = torch.zeros_like(output)
        self.prompts_gradient: Tensor | None = None
        if inputs.prompts is not None:
            self.prompts_gradient = output.new_zeros(inputs.prompts.shape)
        self.adapter_gradients: dict[Slot, list[Tensor]] = {}

    def results(self, with_adapter: bool) -> Iterator[Tensor]:
        """The gradients of hidden, prompts and, if asked for, the adapter, on the CPU, in the
        dtypes of what they belong to.
        """
        self.trail.drop()
        inputs = self.inputs
        yield self.hidden_gradient.to("cpu", inputs.hidden.dtype)
        if inputs.prompts is not None and self.prompts_gradient is not None:
            yield self.prompts_gradient.to("cpu", inputs.prompts.dtype)
        if with_adapter and inputs.adapter is not None:
            for slot, part in inputs.adapter.parts.items():
                found = self.adapter_gradients.get(slot)
                of_part = found or [torch.zeros_like(tensor) for tensor in (part.a, part.b)]
                yield from (gradient.cpu() for gradient in of_part)

    def give_up(self) -> None:
        """Let the trail go."""
        self.trail.drop()

    def _units(self) -> Units:
        if not self.is_recomputed:
            for kept, stages in self.trail.strips:
                self.room = yield
                yield from self._back(kept, stages)
            return
        strip: RowChunk | None = None
        while strip is None or strip.last < self.num_tokens:
            self.room = yield
            strip = self.next_strip(strip)
            if strip is None:
                return
            stages = yield from self._there(strip)
            yield from self._back(strip, stages)

    def _there(self, strip: RowChunk) -> Generator[None, int, list[ChunkActivations]]:
        """Through all blocks once more. The graph is kept where there is room for it, else only the
        states between units.
        """
        states, end = self.hidden[strip.first : strip.last], self.inputs.blocks.end
        stages: list[ChunkActivations] = []
        self.trail.strips.append((strip, stages))
        block = self.inputs.blocks.start
        while block < end:
            keep = self.place.allowance.has_room(strip.num_tokens, end - block)
            blocks = self.fitting(strip, block)
            if not keep:
                blocks = self._traceable(strip, blocks)
            stage, block = self.stage(strip, blocks, states), blocks.end
            stages.append(stage)
            self.count(strip, len(blocks), FORWARD_WORTH)
            # The last graph is wanted at once.
            if keep or block == end:
                states = self.trace(strip, stage)
            else:
                states = self.run(strip, stage, {})
            self.room = yield
        return stages

    def _traceable(self, strip: RowChunk, blocks: BlockSpan) -> BlockSpan:
        """So many of these blocks that their graph fits; at least one."""
        most = max(1, self.place.allowance.tokens_within() // strip.num_tokens)
        return BlockSpan(blocks.start, min(blocks.end, blocks.start + most))

    def _back(self, strip: RowChunk, stages: list[ChunkActivations]) -> Units:
        """Back through all stages; the room for the first unit is at hand."""
        gradient = self.gradient[strip.first : strip.last]
        for stage in reversed(stages):
            if stage.outputs is None:
                self.count(strip, len(stage.blocks), FORWARD_WORTH)
                self.trace(strip, stage)
                self.room = yield
            last = stage.blocks.end
            while last > stage.blocks.start:
                if last < stage.blocks.end:
                    self.room = yield
                most = chunks.blocks_within(
                    self.room, strip.num_tokens, BACKWARD_WORTH, self.num_blocks
                )
                blocks = BlockSpan(max(stage.blocks.start, last - most), last)
                self.count(strip, len(blocks), BACKWARD_WORTH)
                gradient = self._through(strip, stage, blocks, gradient)
                last = blocks.start
            self.trail.forget(stage)
            if stage is not stages[0]:
                self.room = yield
        self.hidden_gradient[strip.first : strip.last] = gradient

    def _through(
        self, strip: RowChunk, stage: ChunkActivations, blocks: BlockSpan, gradient: Tensor
    ) -> Tensor:
        """The gradient before ``blocks``, [n, H], from that behind them."""
        assert stage.outputs is not None
        first, last = blocks.start - stage.blocks.start, blocks.end - stage.blocks.start
        ends, gradients = [stage.outputs[last - 1]], [gradient[None]]
        for block, of_tap in self.tap_gradients.items():
            if block in blocks:
                ends.append(stage.outputs[block - stage.blocks.start])
                gradients.append(of_tap[None, strip.first : strip.last])
        begin = stage.outputs[first - 1] if first else stage.entry
        prompts = [] if stage.prompts is None else stage.prompts[first:last]
        adapted = {} if stage.adapter is None else stage.adapter.parts
        adapted = {slot: part for slot, part in adapted.items() if slot[0] in blocks}
        leaves = [begin, *prompts]
        leaves += (tensor for part in adapted.values() for tensor in (part.a, part.b))
        found = torch.autograd.grad(ends, leaves, gradients, allow_unused=True)
        del stage.outputs[first:]
        for index, part in enumerate(found[1 : 1 + len(prompts)], blocks.start):
            self._add_prompts(strip, index, part)
        self._add_adapter(adapted, iter(found[1 + len(prompts) :]))
        result = found[0]
        return result[0] if result.dim() == 3 else result

    def _add_prompts(self, strip: RowChunk, block: int, gradient: Tensor | None) -> None:
        assert self.prompts_gradient is not None
        if gradient is not None:
            total = self.prompts_gradient[block - self.inputs.blocks.start]
            if len(total) > 1:
                total = total[strip.rows.start : strip.rows.stop]
            total += gradient

    def _add_adapter(self, adapted: Mapping[Slot, LowRank], found: Iterator[Tensor | None]) -> None:
        """Add what one strip has found to the sums over all of them."""
        for slot, part in adapted.items():
            totals = self.adapter_gradients.setdefault(
                slot, [torch.zeros_like(tensor) for tensor in (part.a, part.b)]
            )
            for total in totals:
                gradient = next(found)
                if gradient is not None:
                    total += gradient
