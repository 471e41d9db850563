"""Whole tiny models with random weights, as spans."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoModel,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

from petals.models.loading.quantize import QuantKind
from petals.models.runtime.span import Span
from petals.types import BlockSpan

WriteModel = Callable[..., Path]
"""The fixture `tiny_folder`: (model_type, layout=None) -> folder."""

WIDTH = 48

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=99,
    ),
    "mistral": MistralConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=99,
        sliding_window=7,
    ),
    "bloom": BloomConfig(hidden_size=WIDTH, n_layer=4, n_head=6, vocab_size=99),
    "gptj": GPTJConfig(
        n_embd=WIDTH,
        n_layer=4,
        n_head=6,
        vocab_size=99,
        rotary_dim=4,
        n_positions=24,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        hidden_size=WIDTH,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=99,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "mixtral": MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=99,
    ),
    "falcon": FalconConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=6, vocab_size=99
    ),
    "gemma2": Gemma2Config(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        vocab_size=99,
    ),
    "gpt_oss": GptOssConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
        vocab_size=99,
    ),
    "qwen3_next": Qwen3NextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=99,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


def whole_model(name: str, **overrides: Any) -> Span:
    """All four blocks of a tiny model of ``WIDTH``, numbered 10..13, matrices large enough that
    every block changes its input. ``overrides`` change the config.
    """
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**CONFIGS[name].to_diff_dict() | overrides)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    layers = next(
        found
        for found in (getattr(model, "layers", None), getattr(model, "h", None))
        if found is not None
    )
    loaded = SimpleNamespace(
        base=model,
        layers=layers,
        config=config,
        blocks=BlockSpan(10, 10 + len(layers)),
        dtype=torch.float32,
        quant=QuantKind.NONE,
    )
    return Span(loaded)
