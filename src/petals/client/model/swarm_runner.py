"""Blocks of a model on the servers of a swarm, behind the seam that modules use.

Must not know models, routes or messages.
"""

from typing import Any

from torch import Tensor

from petals.client.block_runner import PassCall, PassOutput, SessionCall
from petals.client.model.inference_session import InferenceSession
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.session.types import Tuning
from petals.client.training.autograd import run_whole
from petals.types import BlockSpan


class SwarmRunner:
    """Blocks of one model on the servers of a swarm, which is joined at the first use."""

    def __init__(self, manager: RemoteSequenceManager) -> None:
        self.manager = manager

    @classmethod
    def of(cls, config: Any, manager: RemoteSequenceManager | None = None) -> "SwarmRunner":
        """From a model's config that carries the client's settings, or from a manager at hand."""
        blocks = BlockSpan(0, config.get_text_config(decoder=True).num_hidden_layers)
        return cls(manager or RemoteSequenceManager(config, blocks))

    @property
    def num_blocks(self) -> int:
        return self.manager.num_blocks

    def open_session(self, blocks: BlockSpan, call: SessionCall) -> InferenceSession:
        return InferenceSession(
            self.manager,
            blocks,
            max_length=call.max_length,
            num_rows=call.num_rows,
            tuning=Tuning(blocks.start, call.prompts, call.adapter),
        )

    def run_whole(self, blocks: BlockSpan, hidden: Tensor, call: PassCall) -> PassOutput:
        return run_whole(self.manager.access, blocks, hidden, call)

    def sequence_manager(self, blocks: BlockSpan) -> RemoteSequenceManager:
        return self.manager[blocks.start : blocks.end]
