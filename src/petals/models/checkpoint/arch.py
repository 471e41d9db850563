"""Where the blocks of a model are: found by looking at its modules, not in a table.

The base class of any decoder in transformers is built on the meta device (no memory, a fraction of
a second) and searched for the list of its layers. Knows nothing of files, weights or devices.
"""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers.initialization import no_init_weights

from petals.errors import ConfigError, ModelNotSupported

building = threading.RLock()
"""Held while a model is built: transformers replaces functions of its own and of torch meanwhile,
and two threads that did so at once would leave the replacements behind for ever.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArch:
    """The shape of one model. Paths are attribute paths from an instance of ``base_class``.

    ``host_path`` names the innermost transformers model around the layers: its forward makes masks
    and rotary tables, its config is the text config. It is "" when the base class is that model.
    """

    model_type: str
    base_class: type[PreTrainedModel]
    host_path: str
    layers_path: str
    num_blocks: int
    hidden_size: int
    vocab_size: int

    @property
    def layers_name(self) -> str:
        """The layer list's attribute on its parent module, for example ``h`` or ``layers``."""
        return self.layers_path.rpartition(".")[2]

    @property
    def is_multimodal(self) -> bool:
        return self.host_path.startswith("language_model")


def describe(config: PretrainedConfig) -> ModelArch:
    """Find the blocks of any decoder of transformers.

    Raises ModelNotSupported, with the reason, for what cannot be split into blocks.
    """
    _refuse_by_config(config)
    base_class = base_class_of(config)
    base = build_on_meta(base_class, config)
    text_config = config.get_text_config(decoder=True)
    num_blocks = int(text_config.num_hidden_layers)
    layers_path = _find_layers(base, text_config, num_blocks)
    host_path = _innermost_model(base, layers_path)
    _refuse_by_forward(config.model_type, base.get_submodule(host_path))
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
    """An instance without memory, from a copy of ``config``."""
    with building, torch.device("meta"), no_init_weights(), _quiet_attention(config) as quiet:
        return model_class(quiet)


@contextmanager
def _quiet_attention(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    quiet = copy.deepcopy(config)
    # A config may carry an attention name that is registered only where the model runs.
    quiet._attn_implementation = "eager"
    yield quiet


def parent_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds ``path``'s last attribute, and that attribute's name."""
    parent_path, _, name = path.rpartition(".")
    return root.get_submodule(parent_path), name


def _find_layers(base: PreTrainedModel, text_config: PretrainedConfig, num_blocks: int) -> str:
    """The outermost ModuleList of ``num_blocks`` entries that belongs to the text model."""
    text_hosts = {
        path
        for path, module in base.named_modules()
        if isinstance(module, PreTrainedModel) and _same_text(module.config, text_config)
    }
    candidates = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks
        and _innermost_model(base, path) in text_hosts
        and any(True for _ in module.parameters())
    ]
    if not candidates:
        raise _not_supported(text_config.model_type, "it has no list of decoder layers")
    return min(candidates, key=lambda path: (path.count("."), len(path)))


def _same_text(config: PretrainedConfig, text_config: PretrainedConfig) -> bool:
    return config.model_type == text_config.model_type and isinstance(config, type(text_config))


def _innermost_model(base: PreTrainedModel, path: str) -> str:
    while path:
        path = path.rpartition(".")[0]
        if isinstance(base.get_submodule(path), PreTrainedModel):
            break
    return path


def _refuse_by_config(config: PretrainedConfig) -> None:
    kind, text = config.model_type, config.get_text_config(decoder=True)
    generative = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        raise _not_supported(kind, "it is an encoder-decoder model, not a decoder alone")
    if not generative and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _not_supported(kind, "transformers has no causal language model for it")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise _not_supported(kind, "it is a bidirectional (masked) language model")
    if getattr(text, "hidden_size_per_layer_input", 0):
        reason = "every block needs per-layer embeddings that only the client could look up"
        raise _not_supported(kind, reason)
    if getattr(text, "num_kv_shared_layers", 0):
        raise _not_supported(kind, "its last blocks read keys and values of earlier blocks")


def _refuse_by_forward(kind: str, host: nn.Module) -> None:
    accepted = inspect.signature(host.forward).parameters
    if "past_key_values" not in accepted:
        reason = "it keeps its past in a recurrent state and not in a cache of keys and values"
        raise _not_supported(kind, reason)
    if "inputs_embeds" not in accepted:
        raise _not_supported(kind, "its forward takes token ids only, no hidden states")


def _not_supported(kind: str, reason: str) -> ConfigError:
    return ModelNotSupported(
        f"Models of type {kind} cannot be served in blocks: {reason}.",
        hint="`petals models check` lists the architectures that work.",
    )
