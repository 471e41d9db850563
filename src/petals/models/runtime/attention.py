"""Attention over a packed batch: each segment attends to its own row, in one forward of the model.

Registered with transformers under the name ``PACKED``, as an attention function and as a mask
function. The mask function makes no mask: a mask over the whole batch would be of size total x sum
of all rows. It hands the model's own rule (causal, sliding window, chunks) to the attention
function, which evaluates the rule for the positions of each segment, once per step. Knows no
architecture; models that do not call transformers' attention interface are adapted in
``attention_replacements``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from petals.models.runtime.batch import BatchContext, Segment, current

PACKED = "petals_packed"

CHUNK_TOKENS = 1024
"""Most new tokens of one row whose attention is computed at once. More are computed in chunks of
this many, so that a mask has at most CHUNK_TOKENS x (tokens of the row) values.
"""

PositionBias = Callable[[int], torch.Tensor]
"""Number of keys -> additive bias [query heads, keys] on the scores (ALiBi)."""

MaskRule = Callable[..., torch.Tensor]
"""(batch, head, query position, key position) -> bool: whether the query sees the key."""

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys [Hkv, length, D] and values [Hkv, length, Dv] of one row, from its position 0."""


class MaskNotUnderstood(RuntimeError):
    """The model builds a mask itself, which packed attention cannot split into segments."""


def _rule_as_mask(
    *, mask_function: Callable[..., Any], device: torch.device, use_vmap: bool = False, **_: Any
) -> torch.Tensor:
    """The mask function that transformers calls: one element that carries the model's rule.

    With ``use_vmap`` the rule cannot be evaluated for tensors of positions, so none is carried.
    """
    marker = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    marker.rule = None if use_vmap else mask_function
    return marker


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    query [1, Hq, total, D], key and value as the cache returned them -> ([1, total, Hq, Dv], None).
    Raises MaskNotUnderstood for a mask that ``_rule_as_mask`` did not make.
    """
    context = current()
    if context is None:
        raise RuntimeError(f"{PACKED} attention runs only inside Span.run")
    options = AttentionOptions(
        rule=_rule_of(attention_mask),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        scaling=scaling,
    )
    return attend_packed(context, (query, key, value), options), None


@dataclass(slots=True, eq=False)
class AttentionOptions:
    """How attention differs from softmax(q k / sqrt(D)) v with a causal mask.

    scaling: factor on q k; None: D ** -0.5. rule: which keys a query sees. softcap: scores become
    ``tanh(score / softcap) * softcap``. sinks: [query heads], a score per head that takes part in
    the softmax without a value. bias: added to the scores.
    """

    scaling: float | None = None
    rule: MaskRule = causal_mask_function
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bias: PositionBias | None = None

    @property
    def is_plain_causal(self) -> bool:
        """Whether only the scaling may differ."""
        changes = (self.softcap, self.sinks, self.bias)
        return self.rule is causal_mask_function and all(change is None for change in changes)


def attend_packed(
    context: BatchContext,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of all segments that are active in this block: [1, total, Hq, Dv].

    qkv: query [1, Hq, total, D], key and value as ``SpanCache.update`` returned them. Tokens of
    inactive segments get zeros: their states are not used, but the tensor keeps its shape.
    """
    query, key, value = qkv
    if context.on_attention is not None:
        context.on_attention(key, value)
    # ``SpanCache.update`` leaves the rows' keys and values in the context where attention sees the
    # written tensors unchanged. Otherwise the model has transformed what ``update`` returned.
    past, context.kv = context.kv, None
    if past is None:
        past = _split(context, key, value)
    outputs: list[torch.Tensor] = []
    done = 0
    for (segment, first, last), row in zip(context.active, past):
        if first > done:
            outputs.append(query.new_zeros((first - done, query.shape[1], row[1].shape[-1])))
        outputs.append(_attend(context, segment, query[0, :, first:last], row, options))
        done = last
    if done < context.total:
        width = outputs[-1].shape[-1]
        outputs.append(query.new_zeros((context.total - done, query.shape[1], width)))
    packed = outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)
    return packed.unsqueeze(0)


def _rule_of(attention_mask: torch.Tensor | None) -> MaskRule:
    if attention_mask is None:
        return causal_mask_function
    rule = getattr(attention_mask, "rule", None)
    if rule is None:
        raise MaskNotUnderstood("the model computes an attention mask of its own")
    return rule


def _split(context: BatchContext, key: torch.Tensor, value: torch.Tensor) -> list[KeysValues]:
    """Split tensors [1, Hkv, sum of lengths, D] that hold the rows of all segments in order."""
    lengths = [segment.end for segment, _, _ in context.active]
    if sum(lengths) != key.shape[2]:
        raise MaskNotUnderstood("attention sees other tokens than the cache was given")
    return list(zip(key[0].split(lengths, dim=1), value[0].split(lengths, dim=1)))


def _attend(
    context: BatchContext,
    segment: Segment,
    query: torch.Tensor,
    row: KeysValues,
    options: AttentionOptions,
) -> torch.Tensor:
    """One segment: query [Hq, n, D] -> [n, Hq, Dv].

    The Hq / Hkv query heads of one key-value head are laid out as additional queries of that head,
    so that grouped-query attention needs no copies of keys and values.
    """
    keys, values = row
    num_heads, num_queries, width = query.shape
    num_kv_heads = keys.shape[0]
    if num_queries > CHUNK_TOKENS:
        return _attend_in_chunks(context, segment, query, row, options)
    first_key, mask = _mask(context, segment, keys.shape[1], options, num_heads // num_kv_heads)
    if first_key:
        keys, values = keys[:, first_key:], values[:, first_key:]
    grouped = query.reshape(num_kv_heads, -1, width)
    if options.softcap is None and options.sinks is None:
        output = functional.scaled_dot_product_attention(
            grouped.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask if mask is None or mask.dim() == 2 else mask.unsqueeze(0),
            scale=options.scaling,
        )
    else:
        output = _attend_unfused(grouped, (keys, values), mask, options)
    return output.reshape(num_heads, num_queries, -1).transpose(0, 1)


def _attend_in_chunks(
    context: BatchContext,
    segment: Segment,
    query: torch.Tensor,
    row: KeysValues,
    options: AttentionOptions,
) -> torch.Tensor:
    """``_attend`` for more than ``CHUNK_TOKENS`` new tokens, with small masks or without any."""
    keys, values = row
    if options.is_plain_causal and segment.start == 0:
        output = functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            is_causal=True,
            scale=options.scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )
        return output[0].transpose(0, 1)
    # The masks are memoised by the identity of their segment, so the chunks are kept for the step.
    memo_key = ("chunks", id(segment))
    if memo_key not in context.memo:
        chunks, start = [], segment.start
        for hidden in segment.hidden.split(CHUNK_TOKENS):
            chunks.append(Segment(hidden=hidden, blocks=segment.blocks, start=start))
            start += len(hidden)
        context.memo[memo_key] = chunks
    outputs = [
        _attend(context, chunk, part, (keys[:, : chunk.end], values[:, : chunk.end]), options)
        for chunk, part in zip(context.memo[memo_key], query.split(CHUNK_TOKENS, dim=1))
    ]
    return torch.cat(outputs)


def _attend_unfused(
    query: torch.Tensor, row: KeysValues, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """Attention with a soft cap or sinks, which the fused kernel does not have.

    query: [Hkv, groups * n, D] -> [Hkv, groups * n, Dv].
    """
    keys, values = row
    scaling = options.scaling if options.scaling is not None else query.shape[-1] ** -0.5
    scores = torch.bmm(query, keys.transpose(1, 2)) * scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores + mask
    if options.sinks is not None:
        num_queries = scores.shape[1] * scores.shape[0] // options.sinks.numel()
        sinks = options.sinks.to(scores.dtype).repeat_interleave(num_queries)
        scores = torch.cat([scores, sinks.view(*scores.shape[:2], 1)], dim=-1)
        weights = scores.float().softmax(-1)[..., :-1]
    else:
        weights = scores.float().softmax(-1)
    return torch.bmm(weights.to(values.dtype), values)


def _mask(
    context: BatchContext,
    segment: Segment,
    num_keys: int,
    options: AttentionOptions,
    num_groups: int,
) -> tuple[int, torch.Tensor | None]:
    """The first key that any query sees, and the additive mask from there on (None: all see all).

    mask: [groups * n, keys], or [Hkv, groups * n, keys] with a bias. Leading keys outside a sliding
    window are cut off and not masked, so that the cost of a step stays that of the window. Computed
    once per step and rule, not once per block.
    """
    if context.on_attention is not None:
        return 0, None  # a probe looks at tensors, not at values
    rule, bias = options.rule, options.bias
    if bias is None and rule is causal_mask_function and num_keys - segment.start == 1:
        return 0, None
    # A model makes one rule object per step and type of block: blocks of one type share the entry.
    memo_key = (id(segment), rule, bias, num_groups)
    if memo_key not in context.memo:
        allowed = _allowed(segment, num_keys, rule, context.device)
        first_key = int(allowed.any(0).int().argmax())
        mask = (
            None
            if allowed[:, first_key:].all()
            else _additive(allowed[:, first_key:], segment.hidden.dtype)
        )
        if bias is not None:
            slopes = bias(num_keys)[:, None, first_key:]
            mask = slopes if mask is None else slopes + mask
            mask = mask.expand(-1, num_keys - segment.start, -1)
            mask = mask.reshape(mask.shape[0] // num_groups, -1, mask.shape[-1])
        elif mask is not None:
            mask = mask.repeat(num_groups, 1)
        context.memo[memo_key] = (first_key, mask)
    return context.memo[memo_key]


def _allowed(segment: Segment, num_keys: int, rule: MaskRule, device: torch.device) -> torch.Tensor:
    """[n, num_keys] bool: which keys each token of the segment sees."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    queries = torch.arange(segment.start, num_keys, device=device)
    keys = torch.arange(num_keys, device=device)
    allowed = rule(zero, zero, queries[:, None], keys[None, :])
    return allowed.expand(queries.shape[0], num_keys)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, float("-inf"))


def register() -> None:
    """Make ``PACKED`` known to transformers. Idempotent; called when a span is built."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _rule_as_mask)
