"""A trial run of two tokens that records how each loaded block behaves: what it writes to the cache
and whether its attention can run packed.

The values of the run do not matter, only shapes and calls. Knows no architecture and no sessions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from petals.errors import ModelNotSupported
from petals.models.runtime.batch import BatchContext, SpanCache
from petals.models.runtime.kv_layout import BlockLayout
from petals.models.runtime.recurrent import states_bytes


@dataclass(slots=True)
class BlockTraits:
    """What one block did in the trial run.

    num_updates: how often it wrote keys and values.
    attends: it called ``PACKED`` attention.
    direct: attention got the very tensors that were written. Then attention may read the rows
    instead; otherwise the block transforms the past (MLA expands its latent vectors).
    recurrent: it asked for a recurrent state.
    returns_tuple: its output is a tuple that begins with the hidden states.
    """

    num_updates: int = 0
    attends: bool = False
    direct: bool = False
    recurrent: bool = False
    returns_tuple: bool = False
    layout: BlockLayout = BlockLayout()


class ProbeCache(SpanCache):
    """A cache that stores nothing and records what each block does."""

    def __init__(self, context: BatchContext, num_states: int) -> None:
        num_blocks = len(context.plans)
        super().__init__(context, num_blocks, [False] * num_blocks, num_states)
        self.traits = [BlockTraits() for _ in range(num_blocks)]
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        context.on_attention = self._on_attention

    def _current(self) -> BlockTraits:
        return self.traits[self._context.block - self._context.first_block]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        traits = self._current()
        traits.num_updates += 1
        traits.layout = BlockLayout(
            key_shape=(key_states.shape[1], key_states.shape[3]),
            value_shape=(value_states.shape[1], value_states.shape[3]),
            dtype=key_states.dtype,
        )
        self._written = (key_states, value_states)
        return key_states, value_states

    def _on_attention(self, key: torch.Tensor, value: torch.Tensor) -> None:
        traits = self._current()
        traits.attends = True
        traits.direct = (
            self._written is not None and self._written[0] is key and self._written[1] is value
        )

    def _state(self) -> LinearAttentionLayer:
        self._current().recurrent = True
        return super()._state()

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        raise ModelNotSupported("Its attention keeps an index of keys that no server can page yet.")

    def finish(self) -> list[BlockTraits]:
        """The traits of all blocks, after the forward.

        Raises ModelNotSupported for a block that writes keys and values more than once.
        """
        for index, traits in enumerate(self.traits):
            block = self._context.first_block + index
            if traits.num_updates > 1:
                raise ModelNotSupported(f"Block {block} writes its cache twice in one step.")
            state = self._recurrent.states.get(block)
            if state is not None:
                layout = traits.layout
                traits.layout = BlockLayout(
                    key_shape=layout.key_shape,
                    value_shape=layout.value_shape,
                    dtype=layout.dtype,
                    state_bytes=states_bytes({block: state}),
                )
        return self.traits
