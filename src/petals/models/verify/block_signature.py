"""Signatures of blocks: equal for blocks that differ only in their weights and their position.

What a test has shown for one block then holds for all blocks with its signature. Knows no
architecture: a signature is made of the types, settings and shapes of the modules.
"""

from collections.abc import Hashable, Iterator

from torch import nn
from transformers import PretrainedConfig

from petals.models.runtime.span import Span

_POSITION_NAMES = ("idx", "index", "layer_number", "layer_id")
"""Parts of the names of attributes that hold a block's position in the model."""


def signature_of(span: Span, block: int) -> Hashable:
    """The signature of ``block``, a number in the whole model."""
    index = block - span.blocks.start
    # ``base.config`` describes the layers of the span only, numbered from 0.
    return layer_signature(span.layers[index], index, span.base.config)


def layer_signature(layer: nn.Module, index: int, config: PretrainedConfig) -> Hashable:
    """The signature of the layer that is number ``index`` of those that ``config`` describes."""
    modules = tuple((name, _module_signature(module)) for name, module in layer.named_modules())
    return modules, tuple(_config_entries(index, config))


def _config_entries(index: int, config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """The entries for one layer in the config's lists that have an entry per layer."""
    num_layers = getattr(config, "num_hidden_layers", 0)
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and index < len(value) == num_layers:
            yield name, repr(value[index])


def _module_signature(module: nn.Module) -> Hashable:
    settings = [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not any(name in key for name in _POSITION_NAMES)
    ]
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for owner in (module.named_parameters, module.named_buffers)
        for name, tensor in owner(recurse=False)
    ]
    return (type(module), tuple(sorted(settings, key=lambda item: item[0])), tuple(tensors))
