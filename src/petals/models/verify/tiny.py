"""Tiny configs: any model type with 5 blocks and a hidden size of 32.

Small enough to build in milliseconds, and with the features that show mistakes (grouped heads,
windows shorter than a prompt, experts, mixed layer types). Knows nothing of weights, files or
tests.
"""

import copy
import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from petals.errors import ModelNotSupported
from petals.models.checkpoint.arch import build_on_meta, describe

NUM_BLOCKS = 5
HIDDEN_SIZE = 32
VOCAB_SIZE = 96
SHORT_LENGTH = 12
"""Tokens from which on rope factors change, where they depend on the length; texts are longer."""

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 16,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": SHORT_LENGTH,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "query_pre_attn_scalar": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "block_auto_adjust_ff_dim": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Set in every config that has the attribute, under its own or transformers' common name."""

_WINDOWED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "linear_attention", "full_attention"] * 2
_CONVOLUTIONS = ["conv", "conv", "full_attention", "conv", "full_attention"]
"""Kinds of layers in their order, cut to the number of blocks."""
_NO_EARLY_END = {"eos_token_id": None}
"""Without an end token, generation with random weights runs to its full length."""
_LATENT = {"num_key_value_heads": 4}
"""Latent attention (MLA) expands its cache to one key and value per query head."""

_SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "modernbert-decoder": {"local_attention": 16},
    "gemma2": {"layer_types": _WINDOWED},
    "gemma3_text": {"layer_types": _WINDOWED},
    "gemma4_text": {
        "layer_types": _WINDOWED,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "gpt_oss": {"layer_types": _WINDOWED},
    "cohere2": {"layer_types": _WINDOWED},
    "llama4_text": {"no_rope_layers": [1, 1, 0, 1, 0], "interleave_moe_layer_step": 2},
    "qwen3_next": {"layer_types": _HYBRID},
    "lfm2": {"layer_types": _CONVOLUTIONS},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS, "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1, 4]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "deepseek_v2": {"topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_inner": 48},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gptj": {"rotary_dim": 4},
    "mpt": {"max_seq_len": 256},
    "opt": {"word_embed_proj_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]], "window_size": 8},
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A tiny config of ``model_type``; ``overrides`` go to its (text) config.

    Raises ModelNotSupported if the installed transformers does not know the type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ModelNotSupported(
            f"transformers does not know the model type {model_type!r}.",
            hint="Update transformers, or check the spelling in the model's config.json.",
        )
    config_class = CONFIG_MAPPING[model_type]
    if "text_config" not in config_class.sub_configs:
        return config_class(**_tiny_settings(config_class, model_type, overrides))
    text_class = type(config_class().get_text_config(decoder=True))
    text = text_class(**_tiny_settings(text_class, text_class.model_type, overrides))
    settings: dict[str, Any] = {"text_config": text.to_dict()}
    if "vision_config" in config_class.sub_configs:
        settings["vision_config"] = dict(_VISION)
    if hasattr(config_class(), "mm_tokens_per_image"):
        settings["mm_tokens_per_image"] = 4
    return config_class(**settings)


def _tiny_settings(
    config_class: type[PretrainedConfig], model_type: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    known = _settable_names(config_class)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        sizes |= _LATENT
    settings = sizes | _NO_EARLY_END | _SPECIAL.get(model_type, {}) | overrides
    if "layer_types" in settings:
        num_blocks = settings.get("num_hidden_layers", NUM_BLOCKS)
        settings["layer_types"] = settings["layer_types"][:num_blocks]
    return settings


def _settable_names(config_class: type[PretrainedConfig]) -> set[str]:
    """Names that the constructor accepts, transformers' common names included."""
    own = {entry.name for entry in dataclasses.fields(config_class)}
    return own | {common for common, name in config_class.attribute_map.items() if name in own}


def with_rope_scaling(config: PretrainedConfig, kind: str) -> PretrainedConfig | None:
    """A copy of a tiny config whose rope factors change at `SHORT_LENGTH` tokens; None if the
    model has no rotary factors, or its config refuses the scaling.

    kind: "dynamic" or "longrope".
    """
    scaled = copy.deepcopy(config)
    text = scaled.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None)
    widths = _num_frequencies(config)
    if not rope or not widths:
        return None
    if kind == "dynamic":
        text.max_position_embeddings = SHORT_LENGTH
    for layer_type, width in widths.items():
        one = rope[layer_type] if layer_type else rope
        one |= _SCALINGS[kind] | {"rope_type": kind}
        if kind == "longrope":
            one["short_factor"] = [1.0] * width
            one["long_factor"] = [1.0 + index / width for index in range(width)]
    try:
        text.validate_rope()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return scaled


_SCALINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    # The last two are what PhiMoE multiplies its tables by.
    "longrope": {
        "original_max_position_embeddings": SHORT_LENGTH,
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    },
}


def _num_frequencies(config: PretrainedConfig) -> dict[str, int]:
    """Rotary frequencies of the model, by type of layer; the key is "" if all share them."""
    arch = describe(config)
    host = build_on_meta(arch.base_class, config).get_submodule(arch.host_path)
    found = {}
    for module in host.modules():
        types = getattr(module, "rope_type", None)
        for layer_type in types if isinstance(types, dict) else [""] * (types is not None):
            prefix = f"{layer_type}_" if layer_type else ""
            found[layer_type] = len(getattr(module, f"{prefix}inv_freq"))
    return found
