"""A client's part of a model around spans of this process, to compare with the whole model.

Knows no network: the spans run where a client would send the states to servers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from petals.models.checkpoint.arch import ModelArch
from petals.models.loading.head import HeadKind, layers_return_tuple, load_client_part
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span


class LocalBlocks(nn.Module):
    """The layer list of a client's part: one layer, which runs whole sequences through ``spans``.

    returns_tuple: whether the model's own layers return (hidden, ...) instead of hidden.
    """

    def __init__(self, spans: Sequence[Span], returns_tuple: bool) -> None:
        super().__init__()
        self._spans = tuple(spans)
        self._returns_tuple = returns_tuple

    def __iter__(self) -> Iterator["LocalBlocks"]:
        return iter((self,))

    def __getitem__(self, index: slice) -> tuple["LocalBlocks"]:
        return (self,)

    def __len__(self) -> int:
        return sum(len(span.blocks) for span in self._spans)

    def forward(
        self, hidden: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """[1, n, H] -> the same shape."""
        states = hidden[0]
        for span in self._spans:
            (states,) = span.run([Segment(hidden=states, blocks=span.blocks)])
        return (states[None],) if self._returns_tuple else states[None]


@torch.inference_mode()
def client_logits(folder: Path, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] of token ids [1, n]: ends as a client loads them, blocks in ``spans``."""

    def make_blocks(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
        return LocalBlocks(spans, layers_return_tuple(arch, config))

    model = load_client_part(str(folder), HeadKind.CAUSAL_LM, make_blocks)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits
