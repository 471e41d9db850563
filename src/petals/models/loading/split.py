"""A server's part of a model: blocks [start, end) of any decoder, and nothing else in memory.

The base class of transformers is subclassed so that everything outside the span becomes a stub
before weights load; renames, expert fusion and quantizers of transformers then run unmodified.
Knows no sessions, no caches, no network.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from petals.errors import BlocksNotServed, ModelFilesBroken
from petals.models.checkpoint.arch import ModelArch, build_on_meta, building, describe, parent_of
from petals.models.checkpoint.sources import Checkpoint, HubAccess, opened
from petals.models.checkpoint.weights import ReadProgress, needed_keys, open_tensors
from petals.models.loading.quantize import (
    QuantKind,
    quantization_config_for,
    quantize_linears,
    settle_4bit_layers,
)
from petals.types import BlockSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How to load. None keeps the checkpoint's own dtype, and transformers' choice of attention."""

    dtype: torch.dtype | None = None
    device: str = "cpu"
    quant: QuantKind = QuantKind.NONE
    attn_implementation: str | None = None
    access: HubAccess = field(default_factory=HubAccess)
    progress: ReadProgress | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBlocks:
    """Blocks ready to run: frozen, in eval mode.

    ``base`` is the innermost transformers model around the layers; its forward makes masks and
    rotary tables for ``layers``, which are numbered from 0 (``base.config`` is cut to them). Its
    embeddings and norms are stubs. ``config`` is the whole model's text config, uncut.
    """

    config: PretrainedConfig
    arch: ModelArch
    blocks: BlockSpan
    base: PreTrainedModel
    layers: nn.ModuleList
    dtype: torch.dtype
    quant: QuantKind
    opened_files: tuple[str, ...]


class Stub(nn.Module):
    """Stands where a module outside the part was: no parameters, output never looked at.

    A lookup of ids answers zeros that broadcast against hidden states; anything else is passed on.
    """

    def __init__(self, looks_up: bool = False) -> None:
        super().__init__()
        self.looks_up = looks_up

    def forward(
        self, first: torch.Tensor | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor | None:
        if self.looks_up and first is not None:
            return torch.zeros((1,) * (first.dim() + 1), device=first.device)
        return first


def load_blocks(
    source: str | Checkpoint, blocks: BlockSpan, options: LoadOptions | None = None
) -> LoadedBlocks:
    """Load blocks of a hub repository or a local folder; only the files that hold them are opened.

    Raises ModelNotFound, ModelNotSupported, PickleCheckpointRefused, ModelFilesBroken (a tensor is
    missing), BlocksNotServed (the model has no such blocks).
    """
    options = options or LoadOptions()
    checkpoint = opened(source, options.access)
    config = copy.deepcopy(checkpoint.config)
    arch = describe(config)
    if not 0 <= blocks.start < blocks.end <= arch.num_blocks:
        raise BlocksNotServed(
            f"{checkpoint.name} has blocks 0:{arch.num_blocks}, not {blocks}.",
            hint=f"Choose START:END inside 0:{arch.num_blocks}.",
        )
    part = pruned_class(arch.base_class, lambda model: _keep_blocks(model, arch, blocks))
    model, opened_files = load_part(checkpoint, part, options)
    base = model.get_submodule(arch.host_path)
    layers = _close_ranks(base, *parent_of(model, arch.layers_path), blocks)
    if options.quant is QuantKind.INT8:
        quantize_linears(layers)
    base.requires_grad_(False).eval()
    return LoadedBlocks(
        config=config.get_text_config(decoder=True),
        arch=arch,
        blocks=blocks,
        base=base,
        layers=layers,
        dtype=base_dtype(layers),
        quant=options.quant,
        opened_files=opened_files,
    )


def pruned_class(
    model_class: type[PreTrainedModel], prune: Callable[[PreTrainedModel], None]
) -> type[PreTrainedModel]:
    """``model_class`` whose instances lose parts as soon as they are built.

    It keeps the class's names: weight renames and fusions are looked up by them.
    """

    def __init__(self: PreTrainedModel, config: PretrainedConfig, **kwargs: Any) -> None:
        model_class.__init__(self, config, **kwargs)
        prune(self)

    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (model_class,), {"__init__": __init__, **names})


def load_part(
    checkpoint: Checkpoint,
    part: type[PreTrainedModel],
    options: LoadOptions,
    may_be_new: Callable[[str], bool] = lambda name: False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Build ``part`` with the checkpoint's weights; returns it and the names of the files opened.

    A parameter absent from the checkpoint is fatal (ModelFilesBroken) unless ``may_be_new(name)``.
    """
    config = copy.deepcopy(checkpoint.config)
    keys = needed_keys(build_on_meta(part, config), checkpoint.weight_map)
    progress = options.progress
    with building, open_tensors(checkpoint, keys, progress) as lazy, _quiet_transformers():
        settings = _loading_settings(options, options.dtype or config.dtype or lazy.dtype)
        try:
            model, info = part.from_pretrained(
                None, config=config, state_dict=lazy.tensors, **settings
            )
        except RuntimeError as error:
            raise ModelFilesBroken(
                f"The weights of {checkpoint.name} do not fit its config: {error}",
                hint="Config and weights belong to different models, or a file is incomplete.",
            ) from error
        opened_files = lazy.opened_files
    missing = sorted(name for name in info["missing_keys"] if not may_be_new(name))
    if missing:
        raise ModelFilesBroken(
            f"{checkpoint.name} lacks {len(missing)} needed tensors, the first is {missing[0]}.",
            hint="The download is incomplete, or the config is of another model.",
        )
    if "device_map" not in settings:
        model.to(options.device)
    settle_4bit_layers(model)
    return model, opened_files


def _loading_settings(options: LoadOptions, dtype: torch.dtype | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if options.attn_implementation is not None:
        settings["attn_implementation"] = options.attn_implementation
    if options.device != "cpu" and is_accelerate_available():
        # Each tensor goes to its device as it is read; without accelerate all pass through RAM.
        settings["device_map"] = {"": options.device}
    quantization = quantization_config_for(options.quant, dtype or torch.float32)
    if quantization is not None:
        settings["quantization_config"] = quantization
    return settings


def stub_outside(root: nn.Module, kept: str) -> None:
    """Replace every module with parameters that is neither on the way to ``kept`` nor below it."""
    head, _, rest = kept.partition(".")
    for name, child in list(root.named_children()):
        if name == head:
            if rest:
                stub_outside(child, rest)
        elif any(True for _ in child.parameters()):
            setattr(root, name, Stub(looks_up=isinstance(child, nn.Embedding)))


def base_dtype(layers: nn.Module) -> torch.dtype:
    """The floating dtype the layers compute in (their norms', if the matrices are packed)."""
    floating = (p.dtype for p in layers.parameters() if p.dtype.is_floating_point)
    return next(floating, torch.float32)


def _keep_blocks(model: PreTrainedModel, arch: ModelArch, blocks: BlockSpan) -> None:
    stub_outside(model, arch.layers_path)
    layers = model.get_submodule(arch.layers_path)
    for index in range(len(layers)):
        if index not in blocks:
            layers[index] = Stub()


def _close_ranks(base: nn.Module, parent: nn.Module, name: str, blocks: BlockSpan) -> nn.ModuleList:
    """Drop the stubs of other blocks and number the rest from 0, in modules and in the config."""
    layers = getattr(parent, name)[blocks.start : blocks.end]
    setattr(parent, name, layers)
    for module in layers.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= blocks.start
    config = base.config
    total = config.num_hidden_layers
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, key, value[blocks.start : blocks.end])
    config.num_hidden_layers = len(blocks)
    return layers


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Our progress and our errors speak; transformers' bars and reports would only repeat them."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
