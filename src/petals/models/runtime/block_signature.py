"""Which blocks of a model are the same but for their weights and their place.

What has been tested of one block then holds for others of its kind. Knows no architecture: blocks
are compared by their modules, and by what numbers and words these keep.
"""

from collections.abc import Hashable, Iterator

from torch import nn
from transformers import PretrainedConfig

_PLACES = ("idx", "index", "layer_number", "layer_id")
"""In names of attributes that hold a block's place in the model."""


def kind_of(block: nn.Module, place: int, config: PretrainedConfig) -> Hashable:
    """Equal for blocks of the same modules, settings, shapes and dtypes, of which the config says
    the same. place: the block's number in the whole model.
    """
    modules = tuple((name, _kind_of_module(module)) for name, module in block.named_modules())
    return modules, tuple(_said_of(place, config))


def _said_of(place: int, config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """What stands at ``place`` in the config's lists of one entry a block."""
    num_blocks = getattr(config, "num_hidden_layers", 0)
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and place < len(value) == num_blocks:
            yield name, repr(value[place])


def _kind_of_module(module: nn.Module) -> Hashable:
    settings = [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not any(place in key for place in _PLACES)
    ]
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for owner in (module.named_parameters, module.named_buffers)
        for name, tensor in owner(recurse=False)
    ]
    return (type(module), tuple(sorted(settings, key=lambda item: item[0])), tuple(tensors))
