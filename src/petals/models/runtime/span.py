"""A span: loaded blocks that run the tokens of many rows in one forward of the model's own code.

Architectures whose attention or recurrent states cannot be packed run one segment after another,
with the same rows. The forward of every block is wrapped: segments enter and leave at blocks of
their own, so a session may use any part of the span, and blocks that no segment uses are skipped.
Knows no sessions, no budgets and no network.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.errors import BadInput, BlocksNotServed, LengthExceeded, ModelNotSupported, SessionGap
from petals.models.checkpoint.arch import CACHE_ARGUMENT
from petals.models.loading.quantize import QuantKind
from petals.models.loading.split import LoadedBlocks
from petals.models.runtime.attention import PACKED, register
from petals.models.runtime.attention_replacements import replace_attention
from petals.models.runtime.batch import BatchContext, Segment, SpanCache, activate, current
from petals.models.runtime.kv_layout import KVLayout
from petals.models.runtime.lora_hooks import LoraHooks, slots_of
from petals.models.runtime.probe import BlockTraits, ProbeCache
from petals.models.runtime.recurrent import RecurrentRow
from petals.models.runtime.rotary import rotate_by_rope_length
from petals.types import BlockSpan

logger = logging.getLogger(__name__)

MODEL_CODE_ERRORS = (
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
"""What the code of a model in transformers may raise when it runs on a part of the model."""


class Mode(StrEnum):
    """How a span runs a step, from the fastest to the slowest.

    PACKED: all segments in one forward. ONE_BY_ONE: a forward per segment. TOKEN_BY_TOKEN: a
    forward per token, except for the first segment of a row.
    """

    PACKED = "packed"
    ONE_BY_ONE = "one by one"
    TOKEN_BY_TOKEN = "token by token"


class Span:
    """Loaded blocks, ready to run. An instance may be used by one thread at a time.

    Call ``self_test.run_self_test(span)`` before serving: it compares the span with the model's own
    path and may change ``mode`` and ``layout``.

    mode, reason: how steps run, and why not in a faster mode.
    layout: what a row keeps per token.
    slots: the matrices that can take an adapter.
    exact: whether packing may change outputs only in their last bits (f32, not quantized).
    max_positions: the number of learned positions, if the blocks look them up; else None.
    rope_limit: rope length above which rotary factors change; 0 if they do not depend on it.
    weights: addresses of the memory that holds parameters and buffers.
    """

    def __init__(self, loaded: LoadedBlocks) -> None:
        self.blocks = loaded.blocks
        self.base = loaded.base
        self.layers = loaded.layers
        self.hidden_size = int(loaded.config.hidden_size)
        first = next((p for p in loaded.layers.parameters() if p.dtype.is_floating_point), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.dtype = loaded.dtype
        self.quant = loaded.quant
        self.exact = loaded.dtype is torch.float32 and loaded.quant is QuantKind.NONE
        self.max_positions = _position_table(loaded.base)
        self.slots = slots_of(loaded.layers, loaded.blocks.start)
        self.weights = frozenset(
            tensor.untyped_storage().data_ptr()
            for tensor in (*loaded.base.parameters(), *loaded.base.buffers())
        )
        self._lora = LoraHooks(loaded.layers, loaded.blocks.start)
        self._block_forward = BlockForward(loaded)
        self.rope_limit = self._block_forward.rope_limit
        self.mode = Mode.PACKED
        self.reason = ""
        self._choose_mode()

    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Outputs [n, H], one per segment in order. Rows then hold ``start + n`` tokens.

        A segment that starts before its row's length rolls the row back; a segment without tokens
        does nothing else. Raises BlocksNotServed, SessionGap, LengthExceeded and BadInput before
        anything is changed. After any other error each row holds ``start`` tokens, so that the step
        may be repeated.
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
        remaining = iter(outputs)
        return [next(remaining) if s.hidden.shape[0] else s.hidden for s in segments]

    def trace(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Run segments with autograd: the output [1, total, H] of each block, in order.

        All segments pass through the same blocks and have no row; unless ``mode`` is PACKED there
        is only one. ``torch.autograd.grad`` may go back from any of the outputs to any before it.
        Raises what ``run`` raises before it changes anything.
        """
        for segment in segments:
            self._check(segment)
        block_outputs: list[torch.Tensor] = []
        self._forward(segments, block_outputs)
        return block_outputs

    def reference(
        self,
        hidden: torch.Tensor,
        blocks: BlockSpan | None = None,
        rope_length: int | None = None,
    ) -> torch.Tensor:
        """[n, H] -> [n, H] through ``blocks`` (default: all) with the model's own attention.

        Uses no cache and no packing. Differentiable if ``hidden`` requires gradients. rope_length:
        that of all tokens; None: n.
        """
        self._block_forward.use_attention(packed=False)
        try:
            lengths = None if rope_length is None else (rope_length,) * len(hidden)
            segment = Segment(hidden=hidden, blocks=blocks or self.blocks, rope_lengths=lengths)
            context = BatchContext([segment], self.blocks, packed=False)
            with torch.inference_mode(not hidden.requires_grad):
                self._block_forward.run(context, None)
            return context.outputs[0]
        finally:
            self._block_forward.use_attention(packed=self.mode is Mode.PACKED)

    def fall_back(self, reason: str) -> bool:
        """Change to the next slower mode; False if there is none. Rows written before are invalid.

        TOKEN_BY_TOKEN is only for recurrent blocks: some of them compute several tokens at once
        correctly only from an empty state.
        """
        if self.mode is Mode.PACKED:
            self.mode = Mode.ONE_BY_ONE
        elif self.mode is Mode.ONE_BY_ONE and self.recurrent:
            self.mode = Mode.TOKEN_BY_TOKEN
        else:
            return False
        logger.warning("Blocks %s run %s: %s.", self.blocks, self.mode, reason)
        self.reason = reason
        self._probe(packed=False)
        return True

    @property
    def has_narrow_weights(self) -> bool:
        """Whether a parameter has one byte per value: the checkpoint is quantized (fp8, int8)."""
        return any(parameter.itemsize == 1 for parameter in self.layers.parameters())

    @property
    def recurrent(self) -> bool:
        """Whether any block keeps a state that cannot be cut at a position."""
        return any(traits.recurrent for traits in self._block_forward.traits)

    def _choose_mode(self) -> None:
        """Probe with packed attention; fall back if the blocks cannot run packed."""
        try:
            self._probe(packed=True)
            reason = _why_not_packed(self._block_forward.traits)
        except ModelNotSupported:
            raise
        except MODEL_CODE_ERRORS as error:
            reason = f"packed attention fails ({_in_short(error)})"
        if not reason:
            return
        try:
            self.fall_back(reason)
        except ModelNotSupported:
            raise
        except MODEL_CODE_ERRORS as error:
            raise ModelNotSupported(
                f"Its code does not run on a part of the model ({_in_short(error)})."
            ) from error

    def _probe(self, packed: bool) -> None:
        """Select the attention and set ``layout`` by a run of two tokens."""
        hidden = torch.zeros((2, self.hidden_size), dtype=self.dtype, device=self.device)
        self._block_forward.use_attention(packed)
        self._block_forward.probe(hidden, packed)
        # A rollback of recurrent blocks needs the inputs of all tokens.
        input_bytes = self.hidden_size * self.dtype.itemsize if self.recurrent else 0
        self.layout = KVLayout(
            span=self.blocks,
            blocks=tuple(traits.layout for traits in self._block_forward.traits),
            input_bytes=input_bytes,
        )

    def _check(self, segment: Segment) -> None:
        own, blocks = self.blocks, segment.blocks
        if not own.start <= blocks.start < blocks.end <= own.end:
            raise BlocksNotServed(f"Blocks {blocks} are not among {own}.")
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
        """Run one segment outside a packed batch; bring recurrent states to its start before."""
        if segment.row is None or not self.recurrent:
            return self._forward([segment])[0]
        row = segment.row
        if row.recurrent is None:
            row.recurrent = RecurrentRow(row.max_length)
        missing = row.recurrent.rewind(segment.start)
        if missing is not None:
            hidden, lengths = missing
            start = row.recurrent.position
            again = replace(segment, hidden=hidden, start=start, rope_lengths=lengths, tapped={})
            self._feed(again)
        row.recurrent.snapshot()
        return self._feed(segment)

    def _feed(self, segment: Segment) -> torch.Tensor:
        """Run one segment through recurrent blocks and record its inputs for later rollbacks."""
        parts = [segment]
        if self.mode is Mode.TOKEN_BY_TOKEN and segment.start > 0:
            parts = [
                replace(
                    segment,
                    hidden=token,
                    start=segment.start + index,
                    rope_lengths=(length,),
                    tapped={},
                )
                for index, (token, length) in enumerate(
                    zip(segment.hidden.split(1), segment.given_rope_lengths)
                )
            ]
        output = torch.cat([self._forward([part])[0] for part in parts])
        for block in segment.taps:
            segment.tapped[block] = torch.cat([part.tapped[block] for part in parts])
        assert segment.row is not None and segment.row.recurrent is not None
        segment.row.recurrent.advance(segment.hidden, segment.given_rope_lengths)
        return output

    def _forward(
        self, segments: Sequence[Segment], block_outputs: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """One forward; with autograd if ``block_outputs`` is given, which gets them."""
        for segment in segments:
            if segment.adapter is not None:
                self._lora.add(segment.adapter)
        packed = self.mode is Mode.PACKED
        context = BatchContext(segments, self.blocks, packed, block_outputs)
        cache = None
        # Packed segments need the cache even without rows: a model without a cache computes the
        # positions from the shape of the batch, as if it were one text.
        if packed or segments[0].row is not None:
            cache = self._block_forward.cache_for(context)
        with torch.inference_mode(block_outputs is None):
            self._block_forward.run(context, cache)
        return context.outputs


def _in_short(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


def _why_not_packed(traits: list[BlockTraits]) -> str:
    """Why blocks with these traits cannot run packed; "" if they can."""
    if any(block.recurrent for block in traits):
        return "it keeps recurrent states, which cannot be packed"
    if any(block.num_updates and not block.attends for block in traits):
        return "its attention does not go through transformers' attention interface"
    return ""


def _position_table(base: nn.Module) -> int | None:
    """Length of the table of positions that rotary modules look up (GPT-J), if there is one."""
    tables = [
        buffer.shape[0] for name, buffer in base.named_buffers() if name.endswith("embed_positions")
    ]
    return min(tables, default=None)


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
        self.rope_limit = rotate_by_rope_length(loaded.base)

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
                **{CACHE_ARGUMENT: cache},
                use_cache=cache is not None,
                **extra,
            )

    def _wrapped(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        block = self._loaded.blocks.start + index

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context = current()
            if context is None:
                return own(hidden_states, *args, **kwargs)
            plan = context.plans.get(block)
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
