"""The ``Cache`` that the model's own forward uses while a packed batch runs.

When a block calls ``update``, the keys and values of each segment are written to the row of the
segment. What ``update`` returns depends on the block. Where attention gets the very tensors that
were written (``BlockTraits.direct``), the new tokens are returned as they are and attention reads
the rows from the context, without a copy. Elsewhere the block transforms the past first (MLA
expands its latent vectors), so the rows of all segments are returned, one after another. Knows no
architecture.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from petals.models.runtime.batch import BatchContext
from petals.models.runtime.recurrent import RecurrentRow


class SpanCache(Cache):
    """The cache of one forward.

    direct: for each block, whether attention may read the rows itself. num_states: recurrent states
    per block, as the config says.
    """

    def __init__(
        self, context: BatchContext, num_layers: int, direct: list[bool], num_states: int
    ) -> None:
        super().__init__(layers=[])
        self._context = context
        self._num_layers = num_layers
        self._direct = direct
        self._num_states = num_states
        # With recurrent blocks a forward has one segment, so there is one set of states.
        row = context.segments[0].row
        kept = row.recurrent if row is not None else None
        self._recurrent = kept if kept is not None else RecurrentRow(context.total)

    def __len__(self) -> int:
        return self._num_layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, total, width] to the rows of the segments active in this block.

        Returns keys and values [1, heads, tokens, width] for attention: the new tokens (direct), or
        the rows of all active segments.
        """
        context = self._context
        block = context.block
        kept = []
        for segment, first, last in context.active:
            key = key_states[0].narrow(1, first, last - first)
            value = value_states[0].narrow(1, first, last - first)
            if segment.row is not None:
                key, value = segment.row.append(block, segment.start, key, value)
            kept.append((key, value))
        if context.packed and self._direct[block - context.first_block]:
            context.kv = kept
            return key_states, value_states
        if len(kept) == 1:
            return kept[0][0].unsqueeze(0), kept[0][1].unsqueeze(0)
        keys = torch.cat([key for key, _ in kept], dim=1)
        values = torch.cat([value for _, value in kept], dim=1)
        return keys.unsqueeze(0), values.unsqueeze(0)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Tokens before this step. With several segments and a layer: [total], one per token.

        A block that asks for a layer's length (Llama 4) computes ``arange(total) + length`` as its
        positions; the tensor makes these the positions in the rows.
        """
        segments = self._context.segments
        if layer_idx is None or len(segments) == 1:
            return segments[0].start
        count = torch.arange(self._context.total, device=self._context.device)
        return self._context.positions()[0] - count

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._context.segments[0].start

    # The methods below are called by the forwards of transformers and describe the cache to them.

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        past = 0 if self._context.packed else self._context.segments[0].start
        return past + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self._context.segments[0].start > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _state(self) -> LinearAttentionLayer:
        return self._recurrent.state(self._context.block, self._num_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = self._state()
        return state.conv_states[state_idx] if state.has_previous_state[state_idx] else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._state().update_conv_state(conv_states, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = self._state()
        return state.recurrent_states[state_idx] if state.has_previous_state[state_idx] else None

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._state().update_recurrent_state(recurrent_states, state_idx, **kwargs)
