"""The backward of a pass: gradients of its inputs, prompts and adapter.

It uses the activations that the forward has saved, or computes them anew from the inputs. Knows no
peers, no messages and no clock.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from petals.models.adapters.low_rank import LowRank, Slot
from petals.server.compute.device import DeviceContext
from petals.server.training import chunks
from petals.server.training.chunked_pass import ChunkedPass, Parts
from petals.server.training.chunks import BACKWARD_COST, FORWARD_COST, RowChunk
from petals.server.training.saved_activations import ChunkActivations, PassInputs, SavedActivations
from petals.server.training.saved_passes import PassSlot
from petals.types import BlockSpan


class BackwardPass(ChunkedPass[list[Tensor]]):
    """Gradients, on the CPU, each in the dtype of its input: of hidden [sum(counts), H], of prompts
    if there are any, and with ``wants_adapter`` of a and b of each slot of the adapter.

    given: the inputs of the forward; None: what ``slot`` has saved is used. gradients: those of the
    output and of each tap, [sum(counts), H]. They may hold NaN and infinity, which spread to the
    results: a gradient scaler at the client counts on it. They reach no state of this server.
    """

    def __init__(
        self,
        owner: str,
        given: PassInputs | None,
        gradients: Sequence[Tensor],
        slot: PassSlot,
        wants_adapter: bool,
    ) -> None:
        super().__init__(owner)
        self._given = given
        self._gradients = gradients
        self._slot = slot
        self._wants_adapter = wants_adapter
        self._adapter_gradients: dict[Slot, list[Tensor]] = {}

    @property
    def cost_tokens(self) -> int:
        """See Job."""
        cost = BACKWARD_COST if self._given is None else FORWARD_COST + BACKWARD_COST
        return self._cost(self.inputs.num_tokens, len(self.inputs.blocks), cost)

    def prepare(self, device: DeviceContext) -> None:
        """See Job. Raises PassExpired, too. Saved activations stay in the slot after an error, for
        a backward whose gradients are right.
        """
        saved = self._slot.find() if self._given is None else None
        inputs = self._given if saved is None else saved.inputs
        assert inputs is not None
        self._begin(device, inputs)
        if saved is None:
            self._put_inputs()
        output, *taps = map(device.place, self._gradients)
        self._gradient, self._tap_gradients = output, dict(zip(inputs.taps, taps))
        self._hidden_gradient = torch.zeros_like(output)
        prompts = inputs.prompts
        self._prompts_gradient = None if prompts is None else output.new_zeros(prompts.shape)
        if saved is None:
            self._slot.drop()
            saved = SavedActivations(inputs, device.activation_budget)
        else:
            self._slot.release()
        self.saved = saved

    def result(self) -> list[Tensor]:
        """See the class."""
        self._drop_saved()
        return list(self._results())

    def _results(self) -> Iterator[Tensor]:
        inputs = self.inputs
        yield self._hidden_gradient.to("cpu", inputs.hidden.dtype)
        if inputs.prompts is not None and self._prompts_gradient is not None:
            yield self._prompts_gradient.to("cpu", inputs.prompts.dtype)
        if self._wants_adapter and inputs.adapter is not None:
            for slot, matrices in inputs.adapter.parts.items():
                found = self._adapter_gradients.get(slot)
                zeros = [torch.zeros_like(tensor) for tensor in (matrices.a, matrices.b)]
                yield from (gradient.cpu() for gradient in found or zeros)

    def _run_parts(self) -> Parts:
        assert self.saved is not None
        if self._given is None:
            for index, (chunk, parts) in enumerate(self.saved.chunks):
                if index:
                    yield
                yield from self._backward(chunk, parts)
            return
        next_chunk = self._next_chunk(None)
        while next_chunk is not None:
            parts = []
            self.saved.chunks.append((next_chunk, parts))
            yield from self._forward(next_chunk, parts)
            yield
            yield from self._backward(next_chunk, parts)
            if next_chunk.last == self.inputs.num_tokens:
                return
            yield
            next_chunk = self._next_chunk(next_chunk)

    def _forward(self, chunk: RowChunk, parts: list[ChunkActivations]) -> Parts:
        """Through all blocks once more; fills ``parts``. Graphs are kept as far as the activation
        budget allows, otherwise only the states between parts: the backward makes the graph of
        such a part right before it uses it, so that one graph exists at a time.
        """
        states = self.hidden[chunk.first : chunk.last]
        block, end = self.inputs.blocks.start, self.inputs.blocks.end
        while True:
            keep = self.device.activation_budget.fits(chunk.num_tokens, end - block)
            blocks = self._next_blocks(chunk, block)
            if not keep:
                blocks = self._traceable(chunk, blocks)
            part, block = self._part(chunk, blocks, states), blocks.end
            parts.append(part)
            self._spend(chunk, len(blocks), FORWARD_COST)
            # The graph of the last part is needed next, whether there is memory or not.
            if keep or block == end:
                states = self._trace(chunk, part)
            else:
                states = self._infer(chunk, part, {})
            if block == end:
                return
            yield

    def _traceable(self, chunk: RowChunk, blocks: BlockSpan) -> BlockSpan:
        """As many of ``blocks`` as have a graph that fits the activation budget, at least one."""
        most = max(1, self.device.activation_budget.tokens_within() // chunk.num_tokens)
        return BlockSpan(blocks.start, min(blocks.end, blocks.start + most))

    def _backward(self, chunk: RowChunk, parts: list[ChunkActivations]) -> Parts:
        """Back through all parts, last to first."""
        assert self.saved is not None
        gradient = self._gradient[chunk.first : chunk.last]
        for part in reversed(parts):
            if part.outputs is None:
                self._spend(chunk, len(part.blocks), FORWARD_COST)
                self._trace(chunk, part)
                yield
            last = part.blocks.end
            while last > part.blocks.start:
                if last < part.blocks.end:
                    yield
                most = chunks.blocks_within(
                    self.budget_tokens, chunk.num_tokens, BACKWARD_COST, self.num_blocks
                )
                blocks = BlockSpan(max(part.blocks.start, last - most), last)
                self._spend(chunk, len(blocks), BACKWARD_COST)
                gradient = self._through(chunk, part, blocks, gradient)
                last = blocks.start
            self.saved.forget(part)
            if part is not parts[0]:
                yield
        self._hidden_gradient[chunk.first : chunk.last] = gradient

    def _through(
        self, chunk: RowChunk, part: ChunkActivations, blocks: BlockSpan, gradient: Tensor
    ) -> Tensor:
        """The gradient [n, H] before ``blocks``, from that behind them. Adds those of prompts and
        adapter to their sums, and releases the graph of ``blocks``.
        """
        assert part.outputs is not None
        first, last = blocks.start - part.blocks.start, blocks.end - part.blocks.start
        ends, gradients = [part.outputs[last - 1]], [gradient[None]]
        for block, of_tap in self._tap_gradients.items():
            if block in blocks:
                ends.append(part.outputs[block - part.blocks.start])
                gradients.append(of_tap[None, chunk.first : chunk.last])
        begin = part.outputs[first - 1] if first else part.entry
        prompts = [] if part.prompts is None else part.prompts[first:last]
        adapted = {} if part.adapter is None else part.adapter.parts
        adapted = {slot: matrices for slot, matrices in adapted.items() if slot[0] in blocks}
        leaves = [begin, *prompts]
        leaves += (tensor for matrices in adapted.values() for tensor in (matrices.a, matrices.b))
        found = torch.autograd.grad(ends, leaves, gradients, allow_unused=True)
        del part.outputs[first:]
        for index, of_prompt in enumerate(found[1 : 1 + len(prompts)], blocks.start):
            self._add_prompts(chunk, index, of_prompt)
        self._add_adapter(adapted, iter(found[1 + len(prompts) :]))
        result = found[0]
        return result[0] if result.dim() == 3 else result

    def _add_prompts(self, chunk: RowChunk, block: int, gradient: Tensor | None) -> None:
        assert self._prompts_gradient is not None
        if gradient is not None:
            total = self._prompts_gradient[block - self.inputs.blocks.start]
            if len(total) > 1:
                total = total[chunk.rows.start : chunk.rows.stop]
            total += gradient

    def _add_adapter(self, adapted: Mapping[Slot, LowRank], found: Iterator[Tensor | None]) -> None:
        for slot, matrices in adapted.items():
            totals = self._adapter_gradients.setdefault(
                slot, [torch.zeros_like(tensor) for tensor in (matrices.a, matrices.b)]
            )
            for total in totals:
                gradient = next(found)
                if gradient is not None:
                    total += gradient
