"""Computes what serving a model costs from its config: weights, KV cache, outbox, arithmetic.

The model is built on the meta device, so that a model of any size takes about a second and no
memory. Knows nothing of files, devices or the swarm.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from petals.errors import ConfigError
from petals.models.checkpoint.arch import build_on_meta, describe
from petals.models.loading.head import HeadKind, base_within, class_for
from petals.models.loading.quantize import QuantKind
from petals.types import BlockSpan

WIRE_BYTES = 2
"""Bytes of one value in an outbox (the outputs a server keeps for replay): bf16."""

_QUANT_BYTES = {QuantKind.INT8: 1.0, QuantKind.BNB_INT8: 1.0, QuantKind.NF4: 0.5625}
_STORED_BYTES = {"fp8": 1.0, "fbgemm_fp8": 1.0, "mxfp4": 0.53125}
"""Bytes per matrix element. Scales are included where they matter: nf4 has one f32 scale per 64
values (0.5 + 4 / 64), mxfp4 one byte per 32 values (0.5 + 1 / 32).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """What one block costs.

    ``kv_bytes_per_token`` is per token of one sequence; a block with a sliding window or chunks
    keeps at most ``window_tokens`` tokens. ``flops_per_token`` is 2 x the parameters in use.
    """

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    window_tokens: int | None
    flops_per_token: int

    def kv_bytes(self, num_tokens: int) -> int:
        """KV bytes of one sequence of ``num_tokens`` tokens."""
        kept = num_tokens if self.window_tokens is None else min(num_tokens, self.window_tokens)
        return kept * self.kv_bytes_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerShare:
    """What one server of a plan holds, in bytes and floating-point operations."""

    blocks: BlockSpan
    weight_bytes: int
    kv_bytes_per_1000_tokens: int
    outbox_bytes_per_1000_tokens: int
    flops_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A model distributed over servers.

    ``client_weight_bytes``: embeddings, final norm and head, which stay with the client.
    """

    model_type: str
    num_blocks: int
    hidden_size: int
    dtype: torch.dtype
    quant: QuantKind
    servers: tuple[ServerShare, ...]
    client_weight_bytes: int
    client_num_parameters: int


def plan(
    config: PretrainedConfig,
    num_servers: int,
    *,
    dtype: torch.dtype | None = None,
    quant: QuantKind = QuantKind.NONE,
) -> Plan:
    """Distribute the blocks over ``num_servers`` servers and compute the cost of each part.

    Raises ConfigError if there are more servers than blocks, ModelNotSupported as ``describe``.
    """
    costs = block_costs(config, dtype=dtype, quant=quant)
    arch = describe(config)
    own_dtype = compute_dtype(config, dtype)
    num_parameters = client_parameters(config)
    outbox = 1000 * arch.hidden_size * WIRE_BYTES
    shares = []
    for span in split_evenly(len(costs), num_servers):
        held = costs[span.start : span.end]
        shares.append(
            ServerShare(
                blocks=span,
                weight_bytes=sum(cost.weight_bytes for cost in held),
                kv_bytes_per_1000_tokens=sum(cost.kv_bytes(1000) for cost in held),
                outbox_bytes_per_1000_tokens=outbox,
                flops_per_token=sum(cost.flops_per_token for cost in held),
            )
        )
    return Plan(
        model_type=config.model_type,
        num_blocks=len(costs),
        hidden_size=arch.hidden_size,
        dtype=own_dtype,
        quant=quant,
        servers=tuple(shares),
        client_weight_bytes=num_parameters * own_dtype.itemsize,
        client_num_parameters=num_parameters,
    )


def split_evenly(num_blocks: int, num_servers: int) -> tuple[BlockSpan, ...]:
    """Consecutive spans of nearly equal length, longer ones first. Raises ConfigError."""
    if not 1 <= num_servers <= num_blocks:
        raise ConfigError(
            f"{num_blocks} blocks cannot be dealt out to {num_servers} servers.",
            hint=f"Choose between 1 and {num_blocks} servers.",
        )
    size, longer = divmod(num_blocks, num_servers)
    starts = [index * size + min(index, longer) for index in range(num_servers + 1)]
    return tuple(BlockSpan(start, end) for start, end in zip(starts, starts[1:]))


def block_costs(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    quant: QuantKind = QuantKind.NONE,
) -> tuple[BlockCost, ...]:
    """The cost of every block; ``dtype`` None means the config's. Raises ModelNotSupported."""
    arch = describe(config)
    layers = build_on_meta(arch.base_class, config).get_submodule(arch.layers_path)
    text = config.get_text_config(decoder=True)
    item_bytes = compute_dtype(config, dtype).itemsize
    matrix_bytes = _QUANT_BYTES.get(quant) or _stored_bytes(config) or item_bytes
    costs = []
    for index, layer in enumerate(layers):
        layer_type = _layer_type(text, index)
        total, matrices = _count(layer)
        costs.append(
            BlockCost(
                num_parameters=total,
                weight_bytes=int(matrices * matrix_bytes + (total - matrices) * item_bytes),
                kv_bytes_per_token=_kv_values(layer, text, layer_type) * item_bytes,
                window_tokens=_window(text, layer_type),
                flops_per_token=2 * _num_used(layer, text, total),
            )
        )
    return tuple(costs)


def client_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of embeddings, final norm and head; a tied head counts once."""
    arch = describe(config)
    model = build_on_meta(class_for(HeadKind.CAUSAL_LM, config, arch), config)
    model.tie_weights()
    base = base_within(model, arch)
    host = base.get_submodule(arch.host_path)
    head = model.get_output_embeddings()
    parts = nn.ModuleList([host] if head is None else [host, head])
    in_blocks = base.get_submodule(arch.layers_path).parameters()
    return _numel(parts.parameters()) - _numel(in_blocks)


def compute_dtype(config: PretrainedConfig, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` if given, else the dtype of the config, else f32."""
    text = config.get_text_config(decoder=True)
    return dtype or config.dtype or text.dtype or torch.float32


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _count(layer: nn.Module) -> tuple[int, int]:
    """(number of parameters, number of those in matrices)."""
    sizes = [(parameter.numel(), parameter.dim() > 1) for parameter in layer.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_matrix in sizes if is_matrix)


def _num_used(layer: nn.Module, text: PretrainedConfig, total: int) -> int:
    """Parameters that one token uses: of the experts only those that it is routed to."""
    # transformers fuses the experts of a layer into tensors [experts, out, in].
    fused = [parameter for parameter in layer.parameters() if parameter.dim() == 3]
    experts = [p for p in fused if p.shape[0] == _first(text, _NUM_EXPERTS)]
    chosen = _first(text, ("num_experts_per_tok", "moe_k", "moe_topk")) or 1
    idle = sum(p.numel() - p.numel() * chosen // p.shape[0] for p in experts)
    return total - idle


_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")


def _kv_values(layer: nn.Module, text: PretrainedConfig, layer_type: str) -> int:
    """Number of values that one token adds to the cache of this block."""
    if layer_type in ("linear_attention", "conv", "mamba"):
        return 0
    # MLA caches one latent vector and one rotary key for all heads.
    latent = _first(text, ("kv_lora_rank",))
    if latent:
        return latent + text.qk_rope_head_dim
    found = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    key, value = found.get("k_proj"), found.get("v_proj")
    if isinstance(key, nn.Linear):
        return key.out_features + (value or key).out_features
    heads = _first(text, _NUM_HEADS) or 1
    kv_heads = _kv_heads(text, heads)
    head_dim = _first(text, ("head_dim",)) or text.hidden_size // heads
    return 2 * kv_heads * head_dim


def _kv_heads(text: PretrainedConfig, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return _first(text, ("num_key_value_heads", "num_kv_heads")) or heads


def _window(text: PretrainedConfig, layer_type: str) -> int | None:
    """Tokens that this block keeps at most; None: all."""
    if layer_type == "chunked_attention":
        return _first(text, ("attention_chunk_size",))
    if layer_type == "sliding_attention":
        return _first(text, ("sliding_window",))
    has_types = getattr(text, "layer_types", None) is not None
    if has_types or not getattr(text, "use_sliding_window", True):
        return None
    return _first(text, ("sliding_window",))


def _layer_type(text: PretrainedConfig, index: int) -> str:
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return types[index] if types else "full_attention"


def _stored_bytes(config: PretrainedConfig) -> float | None:
    """Bytes per matrix element of a quantized checkpoint; None if it is not quantized."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method", ""))
    if method == "bitsandbytes":
        return _QUANT_BYTES[QuantKind.NF4 if settings.get("load_in_4bit") else QuantKind.BNB_INT8]
    bits = settings.get("bits")
    return _STORED_BYTES.get(method) or (bits / 8 if isinstance(bits, int) else None)


def _first(text: PretrainedConfig, names: tuple[str, ...]) -> Any:
    """The first setting of ``names`` that is set and not 0; models name one setting differently."""
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if value), None)
