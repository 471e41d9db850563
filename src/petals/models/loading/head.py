"""Loads a client's part of a model: the transformers class without the weights of its blocks.

Embeddings, final norm and head are loaded; the layer list is replaced by one module that the caller
provides. Knows nothing of routes, sessions or servers.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from petals.errors import ModelFilesBroken, ModelNotSupported
from petals.models.checkpoint.arch import ModelArch, build_on_meta, describe, parent_of
from petals.models.checkpoint.sources import CONFIG_FILE, Checkpoint, as_checkpoint
from petals.models.loading.measure import MIN_MATRIX_BYTES, best_seconds
from petals.models.loading.shared_head import SharedHead
from petals.models.loading.split import LoadOptions, Stub, files_of_part, load_part, pruned_class

logger = logging.getLogger(__name__)

RemoteFactory = Callable[[ModelArch, PretrainedConfig], nn.Module]
"""Makes the module that replaces the layer list. The model's forward slices it
(``[:num_hidden_layers]``), iterates over it and calls every item like a decoder layer.
"""

GENERATION_FILE = "generation_config.json"

_PROBE_ROWS = 4096
"""Rows of the vocabulary in the slice that is measured: a few milliseconds per product."""


class HeadKind(StrEnum):
    """Which head the model has, and with it which transformers class it is."""

    BASE = "base"
    CAUSAL_LM = "causal-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientPartOptions:
    """How to load the client's part.

    chunked: compute logits with ``ChunkedHead``, if the weights are bf16 or f16 on a CPU; None
    measures once whether that is faster. chunk_rows: rows of the vocabulary in one chunk.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    chunked: bool | None = None
    chunk_rows: int = 16384


class ChunkedHead(nn.Linear):
    """A head with bf16 or f16 weights that computes in f32, one chunk of the vocabulary at a time.

    For CPUs that are slow in 16-bit arithmetic. hidden ``[..., H]`` of any float dtype -> logits
    ``[..., V]`` in f32. The module shares the weight of the linear layer it replaces, so that tied
    embeddings stay tied, and converts one chunk of it to f32 at a time: the extra memory is
    ``chunk_rows * H * 4`` bytes.
    """

    def __init__(self, linear: nn.Linear, chunk_rows: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.chunk_rows = chunk_rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        parts = [
            nn.functional.linear(wide, chunk.float())
            for chunk in self.weight.split(self.chunk_rows)
        ]
        logits = torch.cat(parts, dim=-1)
        return logits if self.bias is None else logits + self.bias.float()


def load_client_part(
    source: str | Checkpoint,
    kind: HeadKind,
    make_remote: RemoteFactory,
    options: ClientPartOptions | None = None,
) -> PreTrainedModel:
    """The model of ``kind`` in eval mode, its layer list replaced by the module of ``make_remote``.

    Loaded weights get no gradients. If the checkpoint lacks a classifier's score head, the head is
    initialised at random, as in transformers, and stays trainable; ``loading_info`` of the model
    names it in transformers' form. Raises ModelFilesBroken for any other missing tensor, and what
    ``open_checkpoint`` and ``Checkpoint.weight_map`` raise.
    """
    options = options or ClientPartOptions()
    load = options.load
    checkpoint = as_checkpoint(source, load.access)
    arch = describe(checkpoint.config)
    whole_class = class_for(kind, checkpoint.config, arch)
    part = pruned_class(whole_class, lambda model: _keep_ends(model, arch))
    is_classifier = kind is HeadKind.SEQUENCE_CLASSIFICATION

    def is_score(name: str) -> bool:
        return is_classifier and not name.startswith(f"{whole_class.base_model_prefix}.")

    model, new = _load_ends(checkpoint, kind, part, load, is_score)
    model.loading_info = _loading_info(new)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_score(name))
    parent, attribute = parent_of(base_within(model, arch), arch.layers_path)
    setattr(parent, attribute, make_remote(arch, model.config))
    model.config._name_or_path = checkpoint.name
    if model.can_generate():
        model.generation_config = _generation_config(checkpoint)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and _wants_chunks(head, options):
        model.set_output_embeddings(ChunkedHead(head, options.chunk_rows))
    elif isinstance(head, nn.Linear) and _can_be_shared(head):
        model.set_output_embeddings(SharedHead(head))
    return model.eval()


def _load_ends(
    checkpoint: Checkpoint,
    kind: HeadKind,
    part: type[PreTrainedModel],
    load: LoadOptions,
    is_score: Callable[[str], bool],
) -> tuple[PreTrainedModel, frozenset[str]]:
    """``load_part``, also where the checkpoint of a tied model holds the head's weight alone, which
    transformers finds for a causal model only. Raises ModelFilesBroken.
    """
    config, arch = checkpoint.config, describe(checkpoint.config)
    is_causal = kind is HeadKind.CAUSAL_LM
    outline = build_on_meta(part, config)
    table = outline.get_output_embeddings() if is_causal else outline.get_input_embeddings()
    names = {f"{path}.weight" for path, module in outline.named_modules() if module is table}
    model, new = load_part(checkpoint, part, load, lambda name: is_score(name) or name in names)
    if not names & new:
        return model, new
    if is_causal:
        raise ModelFilesBroken(
            f"{checkpoint.name} has no language-model head ({', '.join(names)}).",
            hint="It is the checkpoint of a base model or of a classifier: load it with "
            "AutoDistributedModel or AutoDistributedModelForSequenceClassification.",
        )
    causal = class_for(HeadKind.CAUSAL_LM, config, arch)
    whole, _ = load_part(
        checkpoint, pruned_class(causal, lambda each: _keep_ends(each, arch)), load
    )
    model.get_input_embeddings().weight = whole.get_input_embeddings().weight
    return model, new - names


def _loading_info(new: frozenset[str]) -> dict[str, Any]:
    """transformers' ``output_loading_info``. Any other lack is an error, so that only a head can be
    missing."""
    lists: dict[str, Any] = {"unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return {"missing_keys": set(new)} | lists


def files_of_ends(checkpoint: Checkpoint) -> set[str]:
    """Names of the weight files that ``load_client_part`` opens for a causal language model."""
    arch = describe(checkpoint.config)
    whole_class = class_for(HeadKind.CAUSAL_LM, checkpoint.config, arch)
    return files_of_part(checkpoint, pruned_class(whole_class, lambda m: _keep_ends(m, arch)))


def class_for(kind: HeadKind, config: PretrainedConfig, arch: ModelArch) -> type[PreTrainedModel]:
    """The transformers class of ``kind`` that contains the architecture's base class.

    Raises ModelNotSupported if transformers has none.
    """
    if kind is HeadKind.BASE:
        return arch.base_class
    tables = {
        HeadKind.CAUSAL_LM: (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING),
        HeadKind.SEQUENCE_CLASSIFICATION: (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,),
    }
    for table in tables[kind]:
        if type(config) in table and _contains(table[type(config)], config, arch):
            return table[type(config)]
    raise ModelNotSupported(
        f"transformers has no {kind} class for models of type {config.model_type}.",
        hint="Load the base model and put a head of your own on its hidden states.",
    )


def base_within(model: PreTrainedModel, arch: ModelArch) -> nn.Module:
    """The instance of the architecture's base class inside ``model`` (or ``model`` itself)."""
    return next(module for module in model.modules() if isinstance(module, arch.base_class))


def layer_tuple_size(arch: ModelArch, config: PretrainedConfig) -> int:
    """How many values the architecture's layers return as a tuple ``(hidden, ...)``; 0: they return
    the hidden states alone.

    One layer is run without weights: on the meta device, or, if its code reads values of tensors
    (some experts do), on the CPU. Raises ModelNotSupported if it runs on neither.
    """
    try:
        return _run_first_layer(arch, config, "meta")
    except (RuntimeError, NotImplementedError):
        pass
    try:
        return _run_first_layer(arch, config, "cpu")
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelNotSupported(
            f"A layer of {config.model_type} cannot be run apart: {type(error).__name__}: {error}",
            hint="`petals models check` lists the architectures that work.",
        ) from error


def _run_first_layer(arch: ModelArch, config: PretrainedConfig, device: str) -> int:
    base = build_on_meta(arch.base_class, _without_rope_scaling(config))
    base.to(torch.bfloat16).eval()
    first = base.get_submodule(arch.layers_path)[:1]
    setattr(*parent_of(base, arch.layers_path), first)
    found: list[int] = []

    def see(*call: object) -> None:
        output = call[-1]
        found.append(len(output) if isinstance(output, tuple) else 0)

    first[0].register_forward_hook(see)
    host = base.get_submodule(arch.host_path)
    width = host.get_input_embeddings().embedding_dim
    if device != "meta":
        host.to_empty(device=device)
        for tensor in host.state_dict().values():
            tensor.zero_()
    with torch.no_grad(), torch.device(device):
        host(
            inputs_embeds=torch.zeros(1, 1, width, dtype=torch.bfloat16),
            attention_mask=torch.ones(1, 1, dtype=torch.int64),
            use_cache=False,
        )
    return found[0]


def prefers_chunks(weight: torch.Tensor) -> bool:
    """Whether f32 chunks give the logits of one token faster than the 16-bit ``weight`` [V, H].

    Measured on a slice of the weight, since CPUs differ by a factor of ten in bf16 arithmetic.
    """
    part = weight.detach()[:_PROBE_ROWS]
    hidden = torch.ones(1, part.shape[1], dtype=part.dtype)
    wide = hidden.float()
    plain_seconds, chunked_seconds = best_seconds(
        [
            lambda: nn.functional.linear(hidden, part),
            lambda: nn.functional.linear(wide, part.float()),
        ]
    )
    return chunked_seconds < plain_seconds


def _wants_chunks(head: nn.Linear, options: ClientPartOptions) -> bool:
    weight = head.weight
    narrow = weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu"
    if not narrow or options.chunked is not None:
        return narrow and bool(options.chunked)
    return prefers_chunks(weight)


def _can_be_shared(head: nn.Linear) -> bool:
    weight = head.weight
    is_plain = weight.dtype is torch.float32 and weight.device.type == "cpu"
    return is_plain and weight.is_contiguous() and weight.nbytes >= MIN_MATRIX_BYTES


def _contains(
    model_class: type[PreTrainedModel], config: PretrainedConfig, arch: ModelArch
) -> bool:
    model = build_on_meta(model_class, config)
    return any(isinstance(module, arch.base_class) for module in model.modules())


def drop_towers(model: PreTrainedModel, arch: ModelArch) -> None:
    """Put stubs in place of what a multimodal model has for images and sound: petals needs text."""
    base = base_within(model, arch)
    text_root = arch.host_path.partition(".")[0]
    for name, child in list(base.named_children()):
        is_tower = bool(text_root) and name != text_root
        if is_tower and child is not model.get_output_embeddings():
            setattr(base, name, Stub())


def _keep_ends(model: PreTrainedModel, arch: ModelArch) -> None:
    drop_towers(model, arch)
    setattr(*parent_of(base_within(model, arch), arch.layers_path), Stub())


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The generation settings that transformers would give the model.

    From ``generation_config.json``; if the checkpoint has none or it is no JSON, from the file
    ``config.json``: the config object no longer holds generation settings. Raises ModelFilesBroken
    for settings that transformers refuses.
    """
    if checkpoint.find(GENERATION_FILE) is not None:
        try:
            return _settings_of(checkpoint, GENERATION_FILE)
        except OSError:
            logger.warning(
                "%s of %s is no JSON file: the generation settings of its %s are used.",
                GENERATION_FILE,
                checkpoint.name,
                CONFIG_FILE,
            )
    return _settings_of(checkpoint, CONFIG_FILE, _from_model_config=True)


def _settings_of(checkpoint: Checkpoint, file_name: str, **how: bool) -> GenerationConfig:
    folder = str(checkpoint.path(file_name).parent)
    try:
        return GenerationConfig.from_pretrained(folder, config_file_name=file_name, **how)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelFilesBroken(
            f"transformers refuses the generation settings in {file_name} of {checkpoint.name}: "
            f"{error}",
            hint=f"Correct {file_name}.",
        ) from error


def _without_rope_scaling(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` whose rotary factors do not depend on the length of a text."""
    config = copy.deepcopy(config)
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for scaling in (rope, *rope.values()):
        if isinstance(scaling, dict) and scaling.get("rope_type") in ("dynamic", "longrope"):
            scaling["rope_type"] = "default"
    return config
