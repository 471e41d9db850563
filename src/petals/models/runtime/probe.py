"""A dry run that tells how the loaded blocks behave: what they cache, whom they call.

It works on real blocks and on blocks built on the meta device, so that a plan needs no weights.
Knows no architecture, no sessions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from petals.errors import ModelNotSupported
from petals.models.runtime.batch import BatchContext
from petals.models.runtime.kv_layout import BlockLayout
from petals.models.runtime.recurrent import states_bytes
from petals.models.runtime.span_cache import SpanCache


@dataclass(slots=True)
class BlockTraits:
    """What one block did with two tokens.

    attends: it called packed attention. direct: attention saw exactly what ``update`` was given.
    returns_tuple: its output is a tuple that starts with the hidden states.
    """

    num_updates: int = 0
    attends: bool = False
    direct: bool = False
    recurrent: bool = False
    returns_tuple: bool = False
    layout: BlockLayout = BlockLayout()


class ProbeCache(SpanCache):
    """Hands every write through and takes notes."""

    def __init__(self, context: BatchContext, num_states: int) -> None:
        num_blocks = len(context.plans)
        super().__init__(context, num_blocks, [False] * num_blocks, num_states)
        self.traits = [BlockTraits() for _ in range(num_blocks)]
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        context.observe = self._observe

    def _here(self) -> BlockTraits:
        return self.traits[self._context.block - self._context.first_block]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = self._here()
        here.num_updates += 1
        here.layout = BlockLayout(
            key_shape=(key_states.shape[1], key_states.shape[3]),
            value_shape=(value_states.shape[1], value_states.shape[3]),
            dtype=key_states.dtype,
        )
        self._written = (key_states, value_states)
        return key_states, value_states

    def _observe(self, key: torch.Tensor, value: torch.Tensor) -> None:
        here = self._here()
        here.attends = True
        here.direct = (
            self._written is not None and self._written[0] is key and self._written[1] is value
        )

    def _state(self) -> LinearAttentionLayer:
        self._here().recurrent = True
        return super()._state()

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        raise ModelNotSupported("Its attention keeps an index of keys that no server can page yet.")

    def finish(self) -> list[BlockTraits]:
        """The notes, once the forward is over. Raises ModelNotSupported."""
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
