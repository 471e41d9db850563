"""Runs loaded blocks through the model's own forward, under a batch context.

The forward of every block is wrapped. The wrapper reads the plan of the block from the context:
segments enter and leave at blocks of their own, so a session may use any part of the span, and
blocks that no segment uses are skipped. Knows no rows' lengths and no modes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.errors import ModelNotSupported
from petals.models.loading.split import LoadedBlocks
from petals.models.runtime.attention import PACKED, register
from petals.models.runtime.attention_replacements import replace_attention
from petals.models.runtime.batch import BatchContext, Segment, activate, current
from petals.models.runtime.probe import BlockTraits, ProbeCache
from petals.models.runtime.rotary import rotate_per_segment
from petals.models.runtime.span_cache import SpanCache


class BlockForward:
    """The forward of ``loaded.base``, whose blocks take part as the current context says.

    ``traits``: how each block behaves with the attention in use; valid after ``probe``.
    """

    def __init__(self, loaded: LoadedBlocks) -> None:
        register()
        self._loaded = loaded
        self._configs = _configs_of(loaded.base)
        self._own_attention = [config._attn_implementation for config in self._configs]
        self._num_states = int(getattr(loaded.base.config, "number_of_conv_states", 1))
        self._takes_positions = _accepts(loaded.base, "position_ids")
        self.traits = [BlockTraits() for _ in loaded.layers]
        for index, layer in enumerate(loaded.layers):
            layer.forward = self._wrapped(index, layer.forward)
        replace_attention(loaded.layers)
        rotate_per_segment(loaded.base)

    def use_attention(self, packed: bool) -> None:
        """Make the model call ``PACKED`` attention, or the attention that it was loaded with."""
        for config, own in zip(self._configs, self._own_attention):
            config._attn_implementation = PACKED if packed else own

    def probe(self, hidden: torch.Tensor, packed: bool) -> None:
        """Set ``traits`` by running ``hidden`` [2, H] through all blocks, without rows.

        Two tokens, since models may handle a single one in another way, as in decoding. Raises
        ModelNotSupported, and what the code of the model raises.
        """
        loaded = self._loaded
        segment = Segment(hidden=hidden, blocks=loaded.blocks)
        context = BatchContext([segment], loaded.blocks, packed=packed)
        cache = ProbeCache(context, self._num_states)
        # The wrappers set ``returns_tuple`` in ``self.traits`` while the blocks run.
        self.traits = cache.traits
        with torch.inference_mode():
            self.run(context, cache)
        self.traits = cache.finish()

    def cache_for(self, context: BatchContext) -> SpanCache:
        """A cache that writes to the rows of the segments in ``context``."""
        direct = [traits.direct for traits in self.traits]
        return SpanCache(context, len(self._loaded.layers), direct, self._num_states)

    def run(self, context: BatchContext, cache: SpanCache | None) -> None:
        """Run all segments of ``context``; their outputs are in it afterwards."""
        extra = {"position_ids": context.positions()} if self._takes_positions else {}
        with activate(context):
            self._loaded.base(
                inputs_embeds=context.packed_hidden(),
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            )

    def _wrapped(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        block = self._loaded.blocks.start + index

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context = current()
            if context is None:
                return own(hidden_states, *args, **kwargs)
            plan = context.plans[index]
            if plan is None:
                return (hidden_states, None) if self.traits[index].returns_tuple else hidden_states
            context.block, context.active = block, plan.active
            if context.on_attention is not None:
                _refuse_side_inputs(hidden_states, [*args, *kwargs.values()])
            if plan.entering or plan.prompted:
                hidden_states = context.enter(plan, hidden_states)
            output = own(hidden_states, *args, **kwargs)
            if isinstance(output, tuple):
                self.traits[index].returns_tuple = True
            if plan.leaving or plan.tapped or context.block_outputs is not None:
                context.leave(plan, output[0] if isinstance(output, tuple) else output)
            return output

        return forward


def _refuse_side_inputs(hidden: torch.Tensor, others: list[Any]) -> None:
    """Raise ModelNotSupported if a block gets other hidden states beside the previous block's.

    They would come from blocks further back, which may be on another server.
    """
    for other in others:
        if (
            isinstance(other, torch.Tensor)
            and other.dim() >= 3
            and other.shape[:2] == hidden.shape[:2]
            and other.shape[-1] == hidden.shape[-1]
            and other.dtype == hidden.dtype
        ):
            raise ModelNotSupported("Its blocks read states of blocks further back.")


def _configs_of(base: PreTrainedModel) -> list[PretrainedConfig]:
    """Every config from which a module of ``base`` may read its attention implementation."""
    found = {id(base.config): base.config}
    for module in base.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _accepts(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
