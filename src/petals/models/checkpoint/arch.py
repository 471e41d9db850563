"""Finds the blocks of a model by inspecting its modules, without a table of architectures.

The base class of a transformers decoder is built on the meta device (no memory, a fraction of a
second) and searched for the list of its layers. Knows nothing of files, weights or devices.
"""

import copy
import inspect
import threading
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.initialization import no_init_weights

from petals.errors import ConfigError, ModelFilesBroken, ModelNotSupported

build_lock = threading.RLock()
"""Held while a model is built. transformers then replaces global functions (its own and torch's
initialisers) and restores them afterwards; two threads building at once would each save the other's
replacement as the original, and the process would keep it.
"""

CACHE_ARGUMENT: str = ALL_CACHE_NAMES[0]
"""The argument by which models take their cache: "cache" since transformers 5.24, before that
"past_key_values", which callers may still use.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArch:
    """Where one model keeps its blocks. Paths are attribute paths from a ``base_class`` instance.

    ``layers_path`` leads to the list of blocks. ``host_path`` leads to the innermost transformers
    model that contains this list: its forward makes masks and rotary tables, its config is the text
    config. ``host_path`` is "" when that model is the base class itself.
    """

    model_type: str
    base_class: type[PreTrainedModel]
    host_path: str
    layers_path: str
    num_blocks: int
    hidden_size: int
    vocab_size: int


def describe(config: PretrainedConfig) -> ModelArch:
    """Find the blocks of any transformers decoder.

    Raises ModelNotSupported, with the reason, for a model that cannot be split into blocks.
    """
    _check_config(config)
    base_class = base_class_of(config)
    base = build_on_meta(base_class, config)
    text_config = config.get_text_config(decoder=True)
    num_blocks = int(text_config.num_hidden_layers)
    layers_path = _find_layers(base, text_config, num_blocks)
    host_path = _enclosing_model(base, layers_path)
    _check_forward(config.model_type, base.get_submodule(host_path))
    return ModelArch(
        model_type=config.model_type,
        base_class=base_class,
        host_path=host_path,
        layers_path=layers_path,
        num_blocks=num_blocks,
        hidden_size=int(text_config.hidden_size),
        vocab_size=int(text_config.vocab_size),
    )


def base_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class AutoModel would build. Raises ModelNotSupported if there is none."""
    if type(config) not in MODEL_MAPPING:
        raise _not_supported(config.model_type, "transformers has no base model class for it")
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def build_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """An instance whose parameters take no memory, built from a copy of ``config``.

    Raises ModelFilesBroken if the class refuses the config.
    """
    own_config = copy.deepcopy(config)
    # The config may name an attention that is registered only in a process that runs blocks.
    own_config._attn_implementation = "eager"
    with build_lock, torch.device("meta"), no_init_weights():
        try:
            return model_class(own_config)
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise ModelFilesBroken(
                f"transformers cannot build a {model_class.__name__} from the model's config: "
                f"{type(error).__name__}: {error}",
                hint="Correct config.json, or download it again.",
            ) from error


def parent_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the last attribute of ``path``, and that attribute's name."""
    parent_path, _, name = path.rpartition(".")
    return root.get_submodule(parent_path), name


def _find_layers(base: PreTrainedModel, text_config: PretrainedConfig, num_blocks: int) -> str:
    """Path of the outermost ModuleList of ``num_blocks`` entries that belongs to the text model.

    The text model is required because a multimodal model may have a vision tower with as many
    layers.
    """
    text_models = {
        path
        for path, module in base.named_modules()
        if isinstance(module, PreTrainedModel) and _is_text_config(module.config, text_config)
    }
    candidates = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks
        and _enclosing_model(base, path) in text_models
        and any(True for _ in module.parameters())
    ]
    if not candidates:
        raise _not_supported(text_config.model_type, "it has no list of decoder layers")
    return min(candidates, key=lambda path: (path.count("."), len(path)))


def _is_text_config(config: PretrainedConfig, text_config: PretrainedConfig) -> bool:
    return config.model_type == text_config.model_type and isinstance(config, type(text_config))


def _enclosing_model(base: PreTrainedModel, path: str) -> str:
    """Path of the innermost transformers model that contains the module at ``path``."""
    while path:
        path = path.rpartition(".")[0]
        if isinstance(base.get_submodule(path), PreTrainedModel):
            break
    return path


def _check_config(config: PretrainedConfig) -> None:
    model_type, text_config = config.model_type, config.get_text_config(decoder=True)
    generative = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        raise _not_supported(model_type, "it is an encoder-decoder model, not a decoder alone")
    if not generative and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _not_supported(model_type, "transformers has no causal language model for it")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise _not_supported(model_type, "it is a bidirectional (masked) language model")
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        reason = "every block needs per-layer embeddings that only the client could look up"
        raise _not_supported(model_type, reason)
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise _not_supported(model_type, "its last blocks read keys and values of earlier blocks")


def _check_forward(model_type: str, host: nn.Module) -> None:
    accepted = inspect.signature(host.forward).parameters
    if CACHE_ARGUMENT not in accepted:
        reason = "it keeps its past in a recurrent state and not in a cache of keys and values"
        raise _not_supported(model_type, reason)
    if "inputs_embeds" not in accepted:
        raise _not_supported(model_type, "its forward takes token ids only, no hidden states")


def _not_supported(model_type: str, reason: str) -> ConfigError:
    return ModelNotSupported(
        f"Models of type {model_type} cannot be served in blocks: {reason}.",
        hint="`petals models check` lists the architectures that work.",
    )
