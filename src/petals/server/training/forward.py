"""The way there: whole sequences through some blocks, with the graph kept if that is wanted.

Knows no peers, no messages and no clock.
"""

import torch
from torch import Tensor

from petals.server.compute.device import DeviceContext
from petals.server.training.chunked_pass import (
    ChunkActivations,
    ChunkedPass,
    PassInputs,
    SavedActivations,
    Units,
)
from petals.server.training.chunks import FORWARD_WORTH, RowChunk


class ForwardWalk(ChunkedPass):
    """Through the blocks.

    output: [sum(counts), H]; tapped: the same for each tap; trail: what the way back needs, if it
    was to be kept and there was room.
    """

    def __init__(self, place: DeviceContext, inputs: PassInputs, keep: bool) -> None:
        super().__init__(place, inputs)
        self.place_inputs()
        self.output = torch.empty_like(self.hidden)
        self.tapped = {block: torch.empty_like(self.hidden) for block in inputs.taps}
        self.trail: SavedActivations | None = None
        if keep and place.allowance.free_bytes >= inputs.num_bytes:
            self.trail = SavedActivations(inputs, place.allowance)
            if not place.allowance.has_room(self.num_tokens, len(inputs.blocks)):
                self.give_up()

    def _units(self) -> Units:
        strip = None
        while True:
            self.room = yield
            strip = self.next_strip(strip)
            if strip is None:
                return
            yield from self._through(strip)
            if strip.last == self.num_tokens:
                return

    def _through(self, strip: RowChunk) -> Units:
        states, block = self.hidden[strip.first : strip.last], self.inputs.blocks.start
        stages: list[ChunkActivations] = []
        if self.trail is not None:
            self.trail.strips.append((strip, stages))
        while True:
            stage = self.stage(strip, self.fitting(strip, block), states)
            self.count(strip, len(stage.blocks), FORWARD_WORTH)
            states = self._pass(strip, stage, stages)
            block = stage.blocks.end
            if block == self.inputs.blocks.end:
                self.output[strip.first : strip.last] = states
                return
            self.room = yield

    def _pass(
        self, strip: RowChunk, stage: ChunkActivations, stages: list[ChunkActivations]
    ) -> Tensor:
        allowance = self.place.allowance
        if self.trail is not None and not allowance.has_room(strip.num_tokens, len(stage.blocks)):
            self.give_up()
        if self.trail is None:
            return self.run(strip, stage, self.tapped)
        output = self.trace(strip, stage)
        stages.append(stage)
        assert stage.outputs is not None
        for block in self.inputs.taps:
            if block in stage.blocks:
                tapped = stage.outputs[block - stage.blocks.start].detach()
                self.tapped[block][strip.first : strip.last] = tapped[0]
        return output

    def give_up(self) -> None:
        """Keep nothing."""
        if self.trail is not None:
            self.trail.drop()
            self.trail = None
