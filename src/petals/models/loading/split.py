"""Loads a server's part of a model: blocks [start, end) of any decoder, and nothing else.

The base class of transformers is subclassed so that modules outside the span become stubs before
weights load. Everything transformers does while loading (renames, fusion of experts, quantizers)
then runs unmodified and touches only the tensors of the span. Knows no sessions, no caches and no
network.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from petals.errors import BlocksNotServed, ModelFilesBroken
from petals.models.checkpoint.arch import ModelArch, build_lock, describe, parent_of
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.skeleton import (
    build_skeleton,
    method_of,
    named_reason,
    quiet_transformers,
)
from petals.models.checkpoint.sources import Checkpoint, as_checkpoint
from petals.models.checkpoint.weights import ReadProgress, open_tensors, stored_dtype
from petals.models.loading.quantize import (
    QuantKind,
    fix_4bit_layers,
    quantization_config_for,
    quantize_linears,
)
from petals.types import BlockSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How to load. ``dtype`` None keeps the dtype of the checkpoint. ``ignore_mismatched_sizes``: a
    tensor that may be missing may also be of another shape.
    """

    dtype: torch.dtype | None = None
    device: str = "cpu"
    quant: QuantKind = QuantKind.NONE
    access: HubAccess = field(default_factory=HubAccess)
    progress: ReadProgress | None = None
    ignore_mismatched_sizes: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBlocks:
    """Loaded blocks without gradients, in eval mode.

    ``base`` is the innermost transformers model around the layers: its forward makes masks and
    rotary tables for ``layers``; its embeddings and norms are stubs. ``layers`` and ``base.config``
    describe a model of ``len(blocks)`` layers numbered from 0; ``config`` is the text config of the
    whole model.
    """

    config: PretrainedConfig
    arch: ModelArch
    blocks: BlockSpan
    base: PreTrainedModel
    layers: nn.ModuleList
    dtype: torch.dtype
    quant: QuantKind


class Stub(nn.Module):
    """Replaces a module outside the part; it has no parameters, and its output is never used.

    The model's forward still calls it for every batch, so that the output must have a usable shape:
    its first argument. What kind of stub a module needs is decided here, at loading.
    """

    def forward(self, first: torch.Tensor | None = None, *args: object, **kwargs: object) -> Any:
        return first


class EmbeddingStub(Stub):
    """Replaces an embedding: zeros [1, ..., 1], which broadcast against hidden states."""

    def forward(self, first: torch.Tensor | None = None, *args: object, **kwargs: object) -> Any:
        return None if first is None else torch.zeros((1,) * (first.dim() + 1), device=first.device)


def load_blocks(
    source: str | Checkpoint, blocks: BlockSpan, options: LoadOptions | None = None
) -> LoadedBlocks:
    """Load blocks of a hub repository or a local folder; only the files that hold them are opened.

    Raises ModelNotFound, ModelNotSupported, PickleCheckpointRefused, ModelFilesBroken (a tensor is
    missing or of another shape), BlocksNotServed (the model has no such blocks), ConfigError (the
    quantization cannot be used here), NotEnoughDisk.
    """
    options = options or LoadOptions()
    checkpoint = as_checkpoint(source, options.access)
    config = copy.deepcopy(checkpoint.config)
    arch = describe(config)
    check_blocks(checkpoint.name, arch, blocks)
    part = pruned_class(arch.base_class, lambda model: _keep_blocks(model, arch, blocks))
    model, _ = load_part(checkpoint, part, options)
    base = model.get_submodule(arch.host_path)
    layers = _renumber(base, *parent_of(model, arch.layers_path), blocks)
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
    )


def files_of_blocks(checkpoint: Checkpoint, blocks: BlockSpan | None) -> set[str]:
    """Names of the weight files that ``load_blocks`` opens for ``blocks``; for all if it is None.

    Raises what ``load_blocks`` raises for a config or an index.
    """
    arch = describe(checkpoint.config)
    blocks = blocks or BlockSpan(0, arch.num_blocks)
    check_blocks(checkpoint.name, arch, blocks)
    part = pruned_class(arch.base_class, lambda model: _keep_blocks(model, arch, blocks))
    return files_of_part(checkpoint, part)


def files_of_part(checkpoint: Checkpoint, part: type[PreTrainedModel]) -> set[str]:
    """Names of the weight files that ``load_part`` opens."""
    keys, _ = build_skeleton(checkpoint, part).match(checkpoint.weight_map)
    return {checkpoint.weight_map[key] for key in keys}


def check_blocks(name: str, arch: ModelArch, blocks: BlockSpan) -> None:
    """Raises BlocksNotServed if the model has no such blocks."""
    if not 0 <= blocks.start < blocks.end <= arch.num_blocks:
        raise BlocksNotServed(
            f"{name} has blocks 0:{arch.num_blocks}, not {blocks}.",
            hint=f"Choose START:END inside 0:{arch.num_blocks}.",
        )


def pruned_class(
    model_class: type[PreTrainedModel], prune: Callable[[PreTrainedModel], None]
) -> type[PreTrainedModel]:
    """A subclass of ``model_class`` whose instances are pruned as soon as they are built.

    It keeps the name of the class: transformers looks up weight renames and fusions by it.
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
) -> tuple[PreTrainedModel, frozenset[str]]:
    """An instance of ``part`` (a ``pruned_class``) with the checkpoint's weights, and the names of
    the parameters that the checkpoint lacks and that transformers has initialised.

    Raises ModelFilesBroken for such a parameter unless ``may_be_new(name)`` is true.
    """
    config = copy.deepcopy(checkpoint.config)
    skeleton = build_skeleton(checkpoint, part, options.device)
    keys, _ = skeleton.match(checkpoint.weight_map)
    progress = options.progress
    with build_lock, open_tensors(checkpoint, keys, progress) as tensors, quiet_transformers():
        dtype = options.dtype or config.dtype or stored_dtype(tensors.values())
        settings: dict[str, Any] = {
            "dtype": dtype,
            "output_loading_info": True,
            "device_map": {"": options.device},  # each tensor is placed there as it is read
            "ignore_mismatched_sizes": True,  # so that the error below can name the tensor
        }
        quantization = quantization_config_for(options.quant, dtype or torch.float32)
        if quantization is not None:
            settings["quantization_config"] = quantization
        try:
            with named_reason(checkpoint, method_of(skeleton.quantizer)):
                model, info = part.from_pretrained(
                    None, config=config, state_dict=tensors, **settings
                )
        except RuntimeError as error:
            raise ModelFilesBroken(
                f"The weights of {checkpoint.name} do not fit its config: {error}",
                hint="Config and weights belong to different models, or a file is incomplete.",
            ) from error
    for name, found, wanted in sorted(info["mismatched_keys"]):
        if not (options.ignore_mismatched_sizes and may_be_new(name)):
            raise ModelFilesBroken(
                f"The weights of {checkpoint.name} do not fit its config: {name} is {list(found)}, "
                f"the config makes it {list(wanted)}.",
                hint="Config and weights belong to different models.",
            )
    new = frozenset(info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]})
    missing = sorted(name for name in new if not may_be_new(name))
    if missing:
        raise ModelFilesBroken(
            f"{checkpoint.name} lacks {len(missing)} needed tensors, the first is {missing[0]}.",
            hint="Its files hold no such tensor: the config is of another model, or not all files "
            "are there.",
        )
    if skeleton.is_dequantized:
        _cast_to(model, dtype or torch.float32)
    fix_4bit_layers(model)
    return model, new


def _cast_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters that transformers does not keep in a dtype of their own.

    Beside dequantized matrices, which have ``dtype``, it leaves the rest in the stored dtype, so
    that a product of both fails.
    """
    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (kept and kept.search(name)):
            parameter.data = parameter.data.to(dtype)


def stub_outside(root: nn.Module, kept: str) -> None:
    """Put stubs in place of modules with parameters that neither contain ``kept`` nor are in it."""
    head, _, rest = kept.partition(".")
    for name, child in list(root.named_children()):
        if name == head:
            if rest:
                stub_outside(child, rest)
        elif any(True for _ in child.parameters()):
            setattr(root, name, EmbeddingStub() if isinstance(child, nn.Embedding) else Stub())


def base_dtype(layers: nn.Module) -> torch.dtype:
    """The floating dtype the layers compute in; f32 if they have no floating parameter.

    If the matrices are packed integers, it is the dtype of the norms.
    """
    floating = (p.dtype for p in layers.parameters() if p.dtype.is_floating_point)
    return next(floating, torch.float32)


def _keep_blocks(model: PreTrainedModel, arch: ModelArch, blocks: BlockSpan) -> None:
    stub_outside(model, arch.layers_path)
    layers = model.get_submodule(arch.layers_path)
    for index in range(len(layers)):
        if index not in blocks:
            layers[index] = Stub()


def _renumber(base: nn.Module, parent: nn.Module, name: str, blocks: BlockSpan) -> nn.ModuleList:
    """Drop the stubs of other blocks and number the rest from 0, in modules and in the config.

    A layer's number is its index in the cache, which has ``len(blocks)`` entries; the config's
    lists with one entry per layer (attention type, sparsity) are read at the same number.
    """
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
