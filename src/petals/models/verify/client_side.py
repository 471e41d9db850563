"""A client's part of a model around spans of this process, to compare with the whole model.

Knows no network: the spans run where a client would send the states to servers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from petals.models.checkpoint.arch import ModelArch
from petals.models.loading.head import HeadKind, layer_tuple_size, load_client_part
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span


class LocalBlocks(nn.Module):
    """The layer list of a client's part: one layer, which runs whole sequences through ``spans``.

    tuple_size: values that the model's own layers return as (hidden, ...); 0: hidden alone.
    """

    def __init__(self, spans: Sequence[Span], tuple_size: int) -> None:
        super().__init__()
        self._spans = tuple(spans)
        self._tuple_size = tuple_size

    def __iter__(self) -> Iterator["LocalBlocks"]:
        return iter((self,))

    def __getitem__(self, index: slice) -> tuple["LocalBlocks"]:
        return (self,)

    def __len__(self) -> int:
        return sum(len(span.blocks) for span in self._spans)

    def forward(
        self, hidden: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """[1, n, H] -> the same shape."""
        states = hidden[0]
        for span in self._spans:
            (states,) = span.run([Segment(hidden=states, blocks=span.blocks)])
        output, size = states[None], self._tuple_size
        return (output, *(None,) * (size - 1)) if size else output


@torch.inference_mode()
def client_logits(folder: Path, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] of token ids [1, n]: ends as a client loads them, blocks in ``spans``."""

    def make_blocks(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
        return LocalBlocks(spans, layer_tuple_size(arch, config))

    model = load_client_part(str(folder), HeadKind.CAUSAL_LM, make_blocks)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits
