"""How a client's modules reach blocks: sessions that continue, whole sequences that do not.

The seam between what looks like a model and what looks like a network; tests put blocks of this
process behind it. Must not know models.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from petals.client.forward import run_whole
from petals.client.inference_session import InferenceSession
from petals.client.sequence_manager import RemoteSequenceManager
from petals.types import BlockSpan


class Session(Protocol):
    """A KV cache on the servers, seen from outside."""

    position: int
    output_ids: Tensor | None
    past_key_values: Any

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def step(
        self, inputs: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None
    ) -> Tensor: ...

    def step_rows(
        self,
        hidden: Tensor,
        *,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
    ) -> Tensor: ...

    def close(self) -> None: ...


class BlockRunner(Protocol):
    """Runs consecutive blocks of one model."""

    @property
    def num_blocks(self) -> int: ...

    def open_session(
        self, blocks: BlockSpan, *, max_length: int | None, num_rows: int | None
    ) -> Session: ...

    def run_whole(self, blocks: BlockSpan, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        """Packed whole sequences [sum(counts), H] -> the same shape; nothing is kept."""
        ...

    def sequence_manager(self, blocks: BlockSpan) -> Any: ...


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

    def open_session(
        self, blocks: BlockSpan, *, max_length: int | None, num_rows: int | None
    ) -> InferenceSession:
        return InferenceSession(self.manager, blocks, max_length=max_length, num_rows=num_rows)

    def run_whole(self, blocks: BlockSpan, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        return run_whole(self.manager.access, blocks, hidden, counts)

    def sequence_manager(self, blocks: BlockSpan) -> RemoteSequenceManager:
        return self.manager[blocks.start : blocks.end]
