"""One block of a model in this process, for comparing with the same block on servers.

Servers load and run blocks otherwise; this is the original's function with its way of calling.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.split import LoadOptions, load_blocks
from petals.models.runtime.span import Span
from petals.server.block_utils import resolve_block_dtype
from petals.types import BlockSpan

PastStates = tuple[Tensor, ...]
"""What ``PretrainedBlock`` returns as its cache: the hidden states that have entered the block."""


class PretrainedBlock(nn.Module):
    """A block with the model's own attention, in eval mode and without gradients of its weights."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.layers = span.layers
        self._span = span

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layer_past: PastStates | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor] | tuple[Tensor, PastStates]:
        """Hidden states [batch, tokens, H] -> (the same shape,), and the cache if asked for.

        layer_past: the cache that an earlier call has returned, or an empty tensor; the tokens
        continue it. Differentiable with respect to the hidden states.
        """
        past = layer_past[0] if layer_past is not None else hidden_states[:, :0]
        whole = torch.cat([past, hidden_states], dim=1) if past.numel() else hidden_states
        rows = [self._span.reference(row)[-hidden_states.shape[1] :] for row in whole]
        output = torch.stack(rows).to(hidden_states.dtype)
        return (output, (whole.detach(),)) if use_cache else (output,)


def load_pretrained_block(
    model_name: str,
    block_index: int,
    *,
    config: PretrainedConfig | None = None,
    torch_dtype: torch.dtype | str = "auto",
    **hub: Any,
) -> PretrainedBlock:
    """Block ``block_index`` of a repository or folder. dtype "auto": see ``resolve_block_dtype``.

    hub: ``revision``, ``token``, ``cache_dir``. Raises what ``models.loading.split.load_blocks``
    raises.
    """
    access = HubAccess(**hub)
    checkpoint = open_checkpoint(model_name, access)
    dtype = resolve_block_dtype(config or checkpoint.config, torch_dtype)
    options = LoadOptions(dtype=dtype, access=access)
    blocks = BlockSpan(block_index, block_index + 1)
    return PretrainedBlock(Span(load_blocks(checkpoint, blocks, options)))
