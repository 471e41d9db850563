"""Packed attention for older models that do not call transformers' attention interface.

These models ignore a registered attention function without an error. Their attention modules get a
forward from this module, which is used only inside a packed batch; elsewhere the original runs.
Everything else of these models is unchanged.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from petals.models.checkpoint.arch import CACHE_ARGUMENT
from petals.models.runtime.attention import AttentionOptions, PositionBias, attend_packed
from petals.models.runtime.batch import BatchContext, current

ForwardMethod = Callable[..., Any]


def replace_attention(layers: nn.Module) -> None:
    """Adapt the attention modules of BLOOM, Falcon, MPT, GPT-J and CodeGen to packed batches."""
    for module in layers.modules():
        adapt = _ADAPTERS.get(type(module).__name__)
        if adapt is not None:
            adapt(module)


def _adapt_forward(packed: Callable[..., torch.Tensor]) -> Callable[[nn.Module], None]:
    """An adapter that runs ``packed(module, hidden, context, ...)`` in packed batches.

    ``packed`` also gets the remaining arguments of the original forward.
    """

    def adapt(module: nn.Module) -> None:
        own = module.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context = current()
            if context is None or not context.packed:
                return own(hidden_states, *args, **kwargs)
            return packed(module, hidden_states, context, *args, **kwargs), None

        module.forward = forward

    return adapt


def _adapt_attn(module: nn.Module) -> None:
    """Replace ``_attn`` (softmax(q k) v) of GPT-J and CodeGen, whose other parts work packed."""
    own = getattr(module, "_attn", None)
    if own is None:
        return  # since transformers 5.24 it calls the attention function of its config

    def attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context = current()
        if context is None or not context.packed:
            return own(query, key, value, *args, **kwargs)
        scaling = 1.0 / float(module.scale_attn)
        attended = attend_packed(context, (query, key, value), AttentionOptions(scaling=scaling))
        return attended.transpose(1, 2), None

    module._attn = attn


def _bloom(
    module: Any,
    hidden: torch.Tensor,
    context: BatchContext,
    residual: torch.Tensor,
    layer_past: Any = None,
    **_: Any,
) -> torch.Tensor:
    query, key, value = module._reshape(module.query_key_value(hidden))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    bias = _bloom_bias(module.num_heads, hidden.dtype, hidden.device)
    options = AttentionOptions(scaling=module.inv_norm_factor, bias=bias)
    attended = attend_packed(context, (query, key, value), options)
    return residual + module.dense(attended.flatten(2))


def _falcon(
    module: Any,
    hidden: torch.Tensor,
    context: BatchContext,
    alibi: torch.Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **_: Any,
) -> torch.Tensor:
    query, key, value = (part.transpose(1, 2) for part in _falcon_heads(module, hidden))
    bias = None
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        bias = _falcon_bias(module.num_heads, module.inv_norm_factor, hidden.dtype, hidden.device)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attended = attend_packed(context, (query, key, value), AttentionOptions(bias=bias))
    return module.dense(attended.flatten(2))


def _falcon_heads(
    module: Any, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value [1, total, heads, width]; keys are not repeated for grouped queries."""
    fused = module.query_key_value(hidden)
    if not module.new_decoder_architecture:
        return module._split_heads(fused)
    per_group = module.num_heads // module.num_kv_heads + 2
    grouped = fused.view(*fused.shape[:2], -1, per_group, module.head_dim)
    return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]


def _mpt(
    module: Any,
    hidden: torch.Tensor,
    context: BatchContext,
    **rest: Any,
) -> torch.Tensor:
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = (*hidden.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (part.view(heads).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    cache = rest.get(CACHE_ARGUMENT)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    bias = _mpt_bias(module.n_heads, hidden.dtype, hidden.device)
    options = AttentionOptions(scaling=module.softmax_scale, bias=bias)
    return module.out_proj(attend_packed(context, (query, key, value), options).flatten(2))


# The three functions below are cached because masks are memoised by the identity of their bias:
# with one object for all blocks, a step computes its masks once.
@lru_cache(maxsize=64)
def _bloom_bias(num_heads: int, dtype: torch.dtype, device: torch.device) -> PositionBias:
    slopes = _get_alibi_slopes(num_heads, device)[:, None]
    return lambda num_keys: (slopes * torch.arange(num_keys, device=device)).to(dtype)


@lru_cache(maxsize=64)
def _falcon_bias(
    num_heads: int, factor: float, dtype: torch.dtype, device: torch.device
) -> PositionBias:
    def bias(num_keys: int) -> torch.Tensor:
        attention_mask = torch.ones((1, num_keys), dtype=torch.long, device=device)
        return build_alibi_tensor(attention_mask, num_heads, dtype)[:, 0] * factor

    return bias


@lru_cache(maxsize=64)
def _mpt_bias(num_heads: int, dtype: torch.dtype, device: torch.device) -> PositionBias:
    return lambda num_keys: build_mpt_alibi_tensor(num_heads, num_keys, device=device)[:, 0].to(
        dtype
    )


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "BloomAttention": _adapt_forward(_bloom),
    "FalconAttention": _adapt_forward(_falcon),
    "MptAttention": _adapt_forward(_mpt),
    "GPTJAttention": _adapt_attn,
    "CodeGenAttention": _adapt_attn,
}
