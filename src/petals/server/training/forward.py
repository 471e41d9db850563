"""The forward of a pass: whole sequences through some blocks, with activations saved if wanted.

Knows no peers, no messages and no clock.
"""

import torch
from torch import Tensor

from petals.server.compute.device import DeviceContext
from petals.server.training.chunked_pass import ChunkedPass, Parts
from petals.server.training.chunks import FORWARD_COST, RowChunk
from petals.server.training.saved_activations import ChunkActivations, PassInputs, SavedActivations
from petals.server.training.saved_passes import PassSlot
from petals.wire.tensors import narrowed

ForwardOutput = tuple[list[Tensor], bool]
"""Outputs of the last block and of each tap, [sum(counts), H] on the CPU in the dtype of the input;
and whether the activations are saved.
"""


class ForwardPass(ChunkedPass[ForwardOutput]):
    """``slot``: where its activations are kept for the backward, if they fit; None: not at all."""

    def __init__(self, owner: str, inputs: PassInputs, slot: PassSlot | None) -> None:
        super().__init__(owner)
        self.inputs = inputs
        self._slot = slot

    @property
    def cost_tokens(self) -> int:
        """See Job."""
        return self._cost(self.inputs.num_tokens, len(self.inputs.blocks), FORWARD_COST)

    def prepare(self, device: DeviceContext) -> None:
        """See Job."""
        self._begin(device, self.inputs)
        self._put_inputs()
        self._output = torch.empty_like(self.hidden)
        self._tapped = {block: torch.empty_like(self.hidden) for block in self.inputs.taps}
        budget, inputs = device.activation_budget, self.inputs
        if self._slot is not None and budget.free_bytes >= inputs.num_bytes:
            self.saved = SavedActivations(inputs, budget)
            # Now that the inputs are counted: a graph that will not fit is not begun.
            if not budget.fits(inputs.num_tokens, len(inputs.blocks)):
                self._drop_saved()

    def result(self) -> ForwardOutput:
        """See ForwardOutput. Hands the saved activations over to the slot."""
        dtype = self.inputs.hidden.dtype
        outputs = [
            narrowed(states, dtype).cpu() for states in (self._output, *self._tapped.values())
        ]
        if self.saved is None or self._slot is None:
            return outputs, False
        self._slot.keep(self.saved)
        return outputs, True

    def _run_parts(self) -> Parts:
        chunk = self._next_chunk(None)
        while chunk is not None:
            yield from self._run_chunk(chunk)
            if chunk.last == self.inputs.num_tokens:
                return
            yield
            chunk = self._next_chunk(chunk)

    def _run_chunk(self, chunk: RowChunk) -> Parts:
        states, block = self.hidden[chunk.first : chunk.last], self.inputs.blocks.start
        done: list[ChunkActivations] = []
        if self.saved is not None:
            self.saved.chunks.append((chunk, done))
        while True:
            part = self._part(chunk, self._next_blocks(chunk, block), states)
            self._spend(chunk, len(part.blocks), FORWARD_COST)
            states = self._run_part(chunk, part, done)
            block = part.blocks.end
            if block == self.inputs.blocks.end:
                self._output[chunk.first : chunk.last] = states
                return
            yield

    def _run_part(
        self, chunk: RowChunk, part: ChunkActivations, done: list[ChunkActivations]
    ) -> Tensor:
        """Output [n, H] of a part. Nothing more is saved once one graph does not fit: a backward
        needs all of them.
        """
        budget = self.device.activation_budget
        if self.saved is not None and not budget.fits(chunk.num_tokens, len(part.blocks)):
            self._drop_saved()
        if self.saved is None:
            return self._infer(chunk, part, self._tapped)
        output = self._trace(chunk, part)
        done.append(part)
        assert part.outputs is not None
        for block in self.inputs.taps:
            if block in part.blocks:
                tapped = part.outputs[block - part.blocks.start].detach()
                self._tapped[block][chunk.first : chunk.last] = tapped[0]
        return output
