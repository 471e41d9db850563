"""Attention over a packed batch: every segment against its own row, in one forward.

Registered with transformers under ``PACKED``. The mask function registered with it makes no mask:
it hands the model's own rule (causal, window, chunks) through to attention, which evaluates it for
each segment's positions, once per step. Knows no architecture; the few models that do not call
transformers' attention interface are adapted in ``attention_replacements``.
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
LONG_TOKENS = 1024
"""More new tokens of one row attend piece by piece, so that their masks stay small."""

Bias = Callable[[int], torch.Tensor]
"""Number of keys -> additive bias [query heads, keys] (ALiBi)."""


Rule = Callable[..., torch.Tensor]
"""(batch, head, query position, key position) -> may the query see the key."""


class MaskNotUnderstood(RuntimeError):
    """The model built its own mask; the packed path cannot read it."""


def _pass_rule(
    *, mask_function: Callable[..., Any], device: torch.device, use_vmap: bool = False, **_: Any
) -> torch.Tensor:
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
    """The function transformers calls: query [1, Hq, total, D] -> ([1, total, Hq, Dv], None)."""
    context = current()
    if context is None:
        raise RuntimeError(f"{PACKED} attention runs only inside Span.run")
    extras = Extras(
        rule=_rule_of(attention_mask),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        scaling=scaling,
    )
    return attend_packed(context, (query, key, value), extras), None


@dataclass(slots=True, eq=False)
class Extras:
    """What changes the plain softmax(q k) v: who sees whom, and what is added to the scores."""

    scaling: float | None = None
    rule: Rule = causal_mask_function
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bias: Bias | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing but softmax(q k) v of what came before."""
        changes = (self.softcap, self.sinks, self.bias)
        return self.rule is causal_mask_function and all(change is None for change in changes)


def attend_packed(
    context: BatchContext, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], extras: Extras
) -> torch.Tensor:
    """Attention of all active segments: [1, total, Hq, Dv]; zeros for the others."""
    query, key, value = qkv
    if context.observe is not None:
        context.observe(key, value)
    past, context.kv = context.kv, None
    if past is None:
        past = _split(context, key, value)
    pieces: list[torch.Tensor] = []
    done = 0
    for (segment, first, last), (keys, values) in zip(context.active, past):
        if first > done:
            pieces.append(query.new_zeros((first - done, query.shape[1], values.shape[-1])))
        pieces.append(_attend(context, segment, query[0, :, first:last], (keys, values), extras))
        done = last
    if done < context.total:
        width = pieces[-1].shape[-1]
        pieces.append(query.new_zeros((context.total - done, query.shape[1], width)))
    joined = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
    return joined.unsqueeze(0)


def _rule_of(attention_mask: torch.Tensor | None) -> Rule:
    if attention_mask is None:
        return causal_mask_function
    rule = getattr(attention_mask, "rule", None)
    if rule is None:
        raise MaskNotUnderstood("the model computes an attention mask of its own")
    return rule


def _split(
    context: BatchContext, key: torch.Tensor, value: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all segments lie one after another, each from its row's position 0."""
    lengths = [segment.end for segment, _, _ in context.active]
    if sum(lengths) != key.shape[2]:
        raise MaskNotUnderstood("attention sees other tokens than the cache was given")
    return list(zip(key[0].split(lengths, dim=1), value[0].split(lengths, dim=1)))


def _attend(
    context: BatchContext,
    segment: Segment,
    query: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    extras: Extras,
) -> torch.Tensor:
    """One segment: query [Hq, n, D], past [Hkv, len, D] -> [n, Hq, Dv].

    Query heads of one KV head are laid out as further queries of it, so that grouped heads need
    no copy of keys and values.
    """
    keys, values = past
    num_heads, num_queries, width = query.shape
    num_kv_heads = keys.shape[0]
    if num_queries > LONG_TOKENS:
        return _attend_in_pieces(context, segment, query, past, extras)
    hidden, mask = _visible(context, segment, keys.shape[1], extras, num_heads // num_kv_heads)
    if hidden:
        keys, values = keys[:, hidden:], values[:, hidden:]
    grouped = query.reshape(num_kv_heads, -1, width)
    if extras.softcap is None and extras.sinks is None:
        output = functional.scaled_dot_product_attention(
            grouped.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask if mask is None or mask.dim() == 2 else mask.unsqueeze(0),
            scale=extras.scaling,
        )
    else:
        output = _attend_by_hand(grouped, (keys, values), mask, extras)
    return output.reshape(num_heads, num_queries, -1).transpose(0, 1)


def _attend_in_pieces(
    context: BatchContext,
    segment: Segment,
    query: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    extras: Extras,
) -> torch.Tensor:
    """The same as ``_attend``; a plain causal row that begins here needs no masks at all."""
    keys, values = past
    if extras.is_plain and segment.start == 0:
        output = functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            is_causal=True,
            scale=extras.scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )
        return output[0].transpose(0, 1)
    # Kept with the masks, which know them by their identity.
    memo_key = ("pieces", id(segment))
    if memo_key not in context.memo:
        pieces, start = [], segment.start
        for hidden in segment.hidden.split(LONG_TOKENS):
            pieces.append(Segment(hidden=hidden, blocks=segment.blocks, start=start))
            start += len(hidden)
        context.memo[memo_key] = pieces
    outputs = [
        _attend(context, piece, part, (keys[:, : piece.end], values[:, : piece.end]), extras)
        for piece, part in zip(context.memo[memo_key], query.split(LONG_TOKENS, dim=1))
    ]
    return torch.cat(outputs)


def _attend_by_hand(
    query: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    extras: Extras,
) -> torch.Tensor:
    """query [Hkv, groups * n, D] with a soft cap on the scores or a sink beside the keys."""
    keys, values = past
    scaling = extras.scaling if extras.scaling is not None else query.shape[-1] ** -0.5
    scores = torch.bmm(query, keys.transpose(1, 2)) * scaling
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if mask is not None:
        scores = scores + mask
    if extras.sinks is not None:
        num_queries = scores.shape[1] * scores.shape[0] // extras.sinks.numel()
        sinks = extras.sinks.to(scores.dtype).repeat_interleave(num_queries)
        scores = torch.cat([scores, sinks.view(*scores.shape[:2], 1)], dim=-1)
        weights = scores.float().softmax(-1)[..., :-1]
    else:
        weights = scores.float().softmax(-1)
    return torch.bmm(weights.to(values.dtype), values)


def _visible(
    context: BatchContext, segment: Segment, num_keys: int, extras: Extras, num_groups: int
) -> tuple[int, torch.Tensor | None]:
    """How many first keys nobody sees, and the additive mask for the rest (None: all see all).

    Computed once per step and rule, not once per block.
    """
    if context.observe is not None:
        return 0, None
    rule, bias = extras.rule, extras.bias
    if bias is None and rule is causal_mask_function and num_keys - segment.start == 1:
        return 0, None
    # A model makes one rule per step and kind of block, so blocks share the memo by its identity.
    memo_key = (id(segment), rule, bias, num_groups)
    if memo_key not in context.memo:
        allowed = _allowed(segment, num_keys, rule, context.device)
        hidden = int(allowed.any(0).int().argmax())
        mask = (
            None
            if allowed[:, hidden:].all()
            else _additive(allowed[:, hidden:], segment.hidden.dtype)
        )
        if bias is not None:
            slopes = bias(num_keys)[:, None, hidden:]
            mask = slopes if mask is None else slopes + mask
            mask = mask.expand(-1, num_keys - segment.start, -1)
            mask = mask.reshape(mask.shape[0] // num_groups, -1, mask.shape[-1])
        elif mask is not None:
            mask = mask.repeat(num_groups, 1)
        context.memo[memo_key] = (hidden, mask)
    return context.memo[memo_key]


def _allowed(segment: Segment, num_keys: int, rule: Rule, device: torch.device) -> torch.Tensor:
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
    """Make ``PACKED`` known to transformers. Called when the first span is built."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _pass_rule)
