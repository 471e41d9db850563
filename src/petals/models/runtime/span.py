"""Blocks at work: a span runs the tokens of many rows in one forward of the model's own code.

Each block's forward is wrapped: segments enter and leave at blocks of their own, so a session may
use any part of the span. Architectures whose attention or state cannot be packed run one row after
another, through the same cache. Knows no sessions, no budgets, no network.
"""

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.errors import BadInput, BlocksNotServed, LengthExceeded, ModelNotSupported, SessionGap
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.attention import PACKED, register
from petals.models.runtime.attention_replacements import replace_attention
from petals.models.runtime.batch import BatchContext, Segment, activate, current
from petals.models.runtime.block_signature import kind_of
from petals.models.runtime.kv_layout import KVLayout
from petals.models.runtime.lora_hooks import LoraHooks, slots_of
from petals.models.runtime.probe import BlockTraits, ProbeCache
from petals.models.runtime.recurrent import RecurrentRow
from petals.models.runtime.rotary import rotate_per_segment
from petals.models.runtime.span_cache import SpanCache
from petals.types import BlockSpan

logger = logging.getLogger(__name__)

FOREIGN_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    ImportError,
    ArithmeticError,
)
"""What the forward of a model we did not write may raise."""


class Mode(StrEnum):
    """How a span runs a step of several segments."""

    PACKED = "packed"
    ONE_BY_ONE = "one by one"
    TOKEN_BY_TOKEN = "token by token"


class BlockStack(Protocol):
    """What ``split.load_blocks`` returns, as far as running needs it."""

    @property
    def blocks(self) -> BlockSpan: ...
    @property
    def base(self) -> PreTrainedModel: ...
    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def quant(self) -> QuantKind: ...


class Span:
    """Loaded blocks, ready to run. One instance belongs to one thread at a time.

    ``mode`` says how; ``layout`` what a token costs; ``slots`` which matrices can take an adapter;
    ``exact`` whether sums in another order may change its outputs only in the last bits. Call
    ``self_test.run_self_test(span)`` before serving: it compares with the model's own path and may
    change both.
    """

    def __init__(self, loaded: BlockStack) -> None:
        register()
        self.blocks = loaded.blocks
        self._base = loaded.base
        self._layers = loaded.layers
        self._configs = _configs_of(loaded.base)
        self._own_attention = [config._attn_implementation for config in self._configs]
        self._num_states = int(getattr(loaded.base.config, "number_of_conv_states", 1))
        self._takes_positions = _accepts(loaded.base, "position_ids")
        self.hidden_size = int(loaded.config.hidden_size)
        first = next((p for p in loaded.layers.parameters() if p.dtype.is_floating_point), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.dtype = loaded.dtype
        self.quant = loaded.quant
        self.exact = loaded.dtype is torch.float32 and loaded.quant is QuantKind.NONE
        self.max_positions = _learned_positions(loaded.layers)
        self.slots = slots_of(loaded.layers, loaded.blocks.start)
        self._lora = LoraHooks(loaded.layers, loaded.blocks.start)
        self.weights = frozenset(
            tensor.untyped_storage().data_ptr()
            for tensor in (*loaded.base.parameters(), *loaded.base.buffers())
        )
        self._wrap_blocks()
        replace_attention(self._layers)
        rotate_per_segment(self._base)
        self._traits = [BlockTraits() for _ in self._layers]
        self.mode = Mode.PACKED
        self.reason = ""
        self._choose_mode()

    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Outputs [n, H], one per segment in order. Rows then hold ``start + n`` tokens.

        Starting before a row's length rolls it back; a segment without tokens does only that.
        Raises BlocksNotServed, SessionGap, LengthExceeded, BadInput before anything is changed.
        After any other error each row holds ``start`` tokens and the step may be repeated.
        """
        for segment in segments:
            self._check(segment)
        for segment in segments:
            if segment.row is not None and segment.start < segment.row.length:
                segment.row.commit(segment.start)
        busy = [segment for segment in segments if segment.hidden.shape[0]]
        if self.mode is Mode.PACKED:
            outputs = self._forward(busy) if busy else []
        else:
            outputs = [self._run_alone(segment) for segment in busy]
        for segment in segments:
            if segment.row is not None:
                segment.row.commit(segment.end)
        ready = iter(outputs)
        return [next(ready) if s.hidden.shape[0] else s.hidden for s in segments]

    def trace(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Run whole rows with autograd on: the output [1, total, H] of each block, in order.

        All segments run through the same blocks, none has a row; unless ``mode`` is PACKED there is
        only one. ``torch.autograd.grad`` may then go back from any of the outputs to any before it.
        Raises what ``run`` raises before it begins.
        """
        for segment in segments:
            self._check(segment)
        borders: list[torch.Tensor] = []
        self._forward(segments, borders)
        return borders

    def kind_of(self, block: int) -> Hashable:
        """Equal for blocks that differ in their weights only."""
        return kind_of(self._layers[block - self.blocks.start], block, self._base.config)

    def fall_back(self, reason: str) -> bool:
        """Take the next slower mode, if there is one; rows written so far are of no use.

        Some recurrent blocks take several tokens only from an empty state: they get one at a time.
        """
        if self.mode is Mode.PACKED:
            self.mode = Mode.ONE_BY_ONE
        elif self.mode is Mode.ONE_BY_ONE and self.recurrent:
            self.mode = Mode.TOKEN_BY_TOKEN
        else:
            return False
        logger.warning("Blocks %s run %s: %s.", self.blocks, self.mode, reason)
        self.reason = reason
        self._use_attention(packed=False)
        self._traits = self._probe(packed=False)
        self.layout = self._layout_of(self._traits)
        return True

    @property
    def has_narrow_weights(self) -> bool:
        """Whether any weight takes a byte or less."""
        return any(parameter.itemsize == 1 for parameter in self._layers.parameters())

    @property
    def recurrent(self) -> bool:
        """Whether any block keeps a state that cannot be cut at a position."""
        return any(traits.recurrent for traits in self._traits)

    def _choose_mode(self) -> None:
        try:
            self._use_attention(packed=True)
            self._traits = self._probe(packed=True)
            self.layout = self._layout_of(self._traits)
            reason = _why_not_packed(self._traits)
        except ModelNotSupported:
            raise
        except FOREIGN_ERRORS as error:
            reason = f"packed attention fails ({_in_short(error)})"
        if not reason:
            return
        try:
            self.fall_back(reason)
        except ModelNotSupported:
            raise
        except FOREIGN_ERRORS as error:
            raise ModelNotSupported(
                f"Its code does not run on a part of the model ({_in_short(error)})."
            ) from error

    def _check(self, segment: Segment) -> None:
        if not self.blocks.covers(segment.blocks) or not len(segment.blocks):
            raise BlocksNotServed(f"BlockStack {segment.blocks} are not among {self.blocks}.")
        if segment.hidden.dim() != 2 or segment.hidden.shape[1] != self.hidden_size:
            raise BadInput(
                f"States of shape {list(segment.hidden.shape)} do not fit this model.",
                hint=f"It takes [tokens, {self.hidden_size}].",
            )
        length = segment.row.length if segment.row is not None else 0
        if segment.start > length:
            raise SessionGap(f"The step starts at {segment.start}, the row holds {length} tokens.")
        if self.max_positions is not None and segment.end > self.max_positions:
            raise LengthExceeded(
                f"Position {segment.end} is beyond the {self.max_positions} this model knows.",
                hint="Its positions are learned; a longer text needs another model.",
            )

    def _run_alone(self, segment: Segment) -> torch.Tensor:
        if segment.row is None or not self.recurrent:
            return self._forward([segment])[0]
        row = segment.row
        if row.recurrent is None:
            row.recurrent = RecurrentRow(row.max_length)
        missed = row.recurrent.rewind(segment.start)
        if missed is not None:
            self._feed(replace(segment, hidden=missed, start=row.recurrent.position, tapped={}))
        row.recurrent.snapshot()
        return self._feed(segment)

    def _feed(self, segment: Segment) -> torch.Tensor:
        parts = [segment]
        if self.mode is Mode.TOKEN_BY_TOKEN and segment.start > 0:
            parts = [
                replace(segment, hidden=token, start=segment.start + index, tapped={})
                for index, token in enumerate(segment.hidden.split(1))
            ]
        output = torch.cat([self._forward([part])[0] for part in parts])
        for block in segment.taps:
            segment.tapped[block] = torch.cat([part.tapped[block] for part in parts])
        assert segment.row is not None and segment.row.recurrent is not None
        segment.row.recurrent.advance(segment.hidden)
        return output

    def _forward(
        self, segments: Sequence[Segment], borders: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        for segment in segments:
            if segment.adapter is not None:
                self._lora.watch(segment.adapter)
        packed = self.mode is Mode.PACKED
        context = BatchContext(segments, self.blocks, packed, borders)
        cache = None
        if packed or segments[0].row is not None:
            # Also for packed rows without memory: models read positions anew where there is none.
            direct = [traits.direct for traits in self._traits]
            cache = SpanCache(context, len(self._layers), direct, self._num_states)
        with torch.inference_mode(borders is None):
            self._call_base(context, cache)
        return context.outputs

    def _call_base(self, context: BatchContext, cache: Any) -> None:
        extra = {"position_ids": context.positions()} if self._takes_positions else {}
        with activate(context):
            self._base(
                inputs_embeds=context.packed_hidden(),
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            )

    def reference(self, hidden: torch.Tensor, blocks: BlockSpan | None = None) -> torch.Tensor:
        """[n, H] -> [n, H] through ``blocks``, all by default, by the model's own path, without any
        cache; with autograd if ``hidden`` asks for it.
        """
        self._use_attention(packed=False)
        try:
            segment = Segment(hidden=hidden, blocks=blocks or self.blocks)
            context = BatchContext([segment], self.blocks, packed=False)
            with torch.inference_mode(not hidden.requires_grad):
                self._call_base(context, None)
            return context.outputs[0]
        finally:
            self._use_attention(packed=self.mode is Mode.PACKED)

    def _probe(self, packed: bool) -> list[BlockTraits]:
        hidden = torch.zeros((2, self.hidden_size), dtype=self.dtype, device=self.device)
        segment = Segment(hidden=hidden, blocks=self.blocks)
        context = BatchContext([segment], self.blocks, packed=packed)
        cache = ProbeCache(context, self._num_states)
        # The wrapped blocks note what they return in the traits they find here.
        self._traits = cache.traits
        with torch.inference_mode():
            self._call_base(context, cache)
        return cache.finish()

    def _layout_of(self, traits: list[BlockTraits]) -> KVLayout:
        recurrent = any(block.recurrent for block in traits)
        return KVLayout(
            span=self.blocks,
            blocks=tuple(block.layout for block in traits),
            input_bytes=self.hidden_size * self.dtype.itemsize if recurrent else 0,
        )

    def _use_attention(self, packed: bool) -> None:
        for config, own in zip(self._configs, self._own_attention):
            config._attn_implementation = PACKED if packed else own

    def _wrap_blocks(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.forward = self._wrapped(index, layer.forward)

    def _wrapped(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        block = self.blocks.start + index

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context = current()
            if context is None:
                return own(hidden_states, *args, **kwargs)
            plan = context.plans[index]
            if plan is None:
                return (hidden_states, None) if self._traits[index].returns_tuple else hidden_states
            context.block, context.active = block, plan.active
            if context.observe is not None:
                _refuse_side_inputs(hidden_states, [*args, *kwargs.values()])
            if plan.entering or plan.prompted:
                hidden_states = context.enter(plan, hidden_states)
            output = own(hidden_states, *args, **kwargs)
            if isinstance(output, tuple):
                self._traits[index].returns_tuple = True
            if plan.leaving or plan.tapped or context.borders is not None:
                context.leave(plan, output[0] if isinstance(output, tuple) else output)
            return output

        return forward


def _in_short(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


def _refuse_side_inputs(hidden: torch.Tensor, others: list[Any]) -> None:
    """Raise ModelNotSupported if a block is given other states than the previous block's."""
    for other in others:
        if (
            isinstance(other, torch.Tensor)
            and other.dim() >= 3
            and other.shape[:2] == hidden.shape[:2]
            and other.shape[-1] == hidden.shape[-1]
            and other.dtype == hidden.dtype
        ):
            raise ModelNotSupported("Its blocks read states of blocks further back.")


def _why_not_packed(traits: list[BlockTraits]) -> str:
    if any(block.recurrent for block in traits):
        return "it keeps recurrent states, which cannot be packed"
    if any(block.num_updates and not block.attends for block in traits):
        return "its attention does not go through transformers' attention interface"
    return ""


def _configs_of(base: PreTrainedModel) -> list[PretrainedConfig]:
    """Every config that attention modules may read their implementation from."""
    found = {id(base.config): base.config}
    for module in base.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _accepts(base: PreTrainedModel, name: str) -> bool:
    parameters = inspect.signature(base.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _learned_positions(layers: nn.Module) -> int | None:
    """Rows of a table of positions that attention modules look up (GPT-J), if there is one."""
    tables = [
        buffer.shape[0] for name, buffer in layers.named_buffers() if "embed_positions" in name
    ]
    return min(tables, default=None)
