"""Loading a model whose blocks stay on servers, and the classes it gets.

A loaded model is an instance of the real class of transformers, by a subclass made while loading:
`DistributedLlamaForCausalLM` is a `LlamaForCausalLM`. Knows no routes and no sessions, nor any
architecture by name.
"""

import copy
import os
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from petals.client.config import ClientConfig
from petals.client.load_options import device_of, hub_access, sift, source_of
from petals.client.model.distributed import (
    DistributedBaseModel,
    DistributedModel,
    with_signature_of,
)
from petals.client.model.generation import DistributedCausalLM
from petals.client.model.remote_sequential import RemoteSequential
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.tuning.lora import load_adapter
from petals.client.tuning.prompts import TuningConfig, add_prompts
from petals.client.tuning.saved import find_tuned, save_tuned
from petals.errors import ConfigError, ModelNotSupported
from petals.models.adapters.files import base_of_adapter
from petals.models.checkpoint.arch import ModelArch
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import Checkpoint, open_checkpoint
from petals.models.loading.head import (
    ClientPartOptions,
    HeadKind,
    base_within,
    layer_tuple_size,
    load_client_part,
)
from petals.models.loading.loadable import check_weights
from petals.models.loading.split import LoadOptions
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Keyword arguments of ``from_pretrained``, sorted.

    whole_config: used in place of the checkpoint's. config: single settings of the model.
    use_cache: None leaves it on, also where the checkpoint's config switches it off.
    """

    client: ClientConfig
    tuning: TuningConfig = field(default_factory=TuningConfig)
    ends: ClientPartOptions = field(default_factory=ClientPartOptions)
    whole_config: PretrainedConfig | None = None
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: GenerationConfig | None = None
    use_cache: bool | None = None

    @classmethod
    def read(cls, options: dict[str, Any]) -> "LoadRequest":
        """Warns of options without effect. Raises ConfigError and NotSupported for options that
        cannot be honoured.
        """
        options = dict(options)
        sift(options)
        given = options.pop("config", None)
        if isinstance(given, str | os.PathLike):
            given = open_checkpoint(str(given)).config
        client = ClientConfig.of(_own(ClientConfig, given, options))
        tuning = TuningConfig(**_own(TuningConfig, given, options))
        dtype = _dtype(options.pop("dtype", options.pop("torch_dtype", None)))
        load = LoadOptions(
            dtype=dtype,
            device=device_of(options.pop("device_map", None)),
            access=hub_access(options),
            ignore_mismatched_sizes=bool(options.pop("ignore_mismatched_sizes", False)),
        )
        chunked = options.pop("use_chunked_forward", "auto")
        ends = ClientPartOptions(
            load=load,
            chunked=None if chunked == "auto" else bool(chunked),
            chunk_rows=options.pop("chunked_forward_step", ClientPartOptions().chunk_rows),
        )
        return cls(
            client=client,
            tuning=tuning,
            ends=ends,
            whole_config=given,
            generation_config=options.pop("generation_config", None),
            use_cache=options.pop("use_cache", None),
            config=options,
        )


def load_pretrained(
    source: str, kind: HeadKind, options: dict[str, Any]
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Load a hub repository, a local folder, or a folder of ``save_pretrained``.

    The last is loaded as the model that was trained, with the trained tensors. An adapter of peft
    is loaded as its base model with the adapter, as in transformers. With
    ``output_loading_info`` a dict of transformers' form comes with the model. Raises what
    ``load_distributed`` and ``SavedTuning.restore`` raise.
    """
    options = dict(options)
    with_info = options.pop("output_loading_info", False)
    saved = find_tuned(source, options)
    if saved is None:
        request = LoadRequest.read(options)
        base = base_of_adapter(source, request.ends.load.access)
        model = load_distributed(base or source, kind, request)
        if base is not None:
            load_adapter(model, source, **asdict(request.ends.load.access))
    else:
        model = load_distributed(saved.base, kind, LoadRequest.read(saved.options | options))
        saved.restore(model)
    return (model, model.loading_info) if with_info else model


def load_distributed(source: str, kind: HeadKind, request: LoadRequest) -> PreTrainedModel:
    """The model of ``kind`` with embeddings and head here and its blocks in the swarm.

    Sends nothing before the first use. Raises ModelNotFound, ModelNotSupported,
    PickleCheckpointRefused, ModelFilesBroken, ConfigError.
    """
    checkpoint, client = open_model(source, request)
    check_weights(checkpoint)
    archs: list[ModelArch] = []

    def make_remote(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
        attach(config, client, request.tuning)
        archs.append(arch)
        manager = RemoteSequenceManager(config, BlockSpan(0, arch.num_blocks))
        blocks = RemoteSequential(config, sequence_manager=manager)
        blocks.tuple_size = layer_tuple_size(arch, checkpoint.config)
        return blocks

    model = distribute(load_client_part(checkpoint, kind, make_remote, request.ends), archs[0])
    model.base_access = checkpoint.access
    add_prompts(model.blocks_host, request.tuning, archs[0].num_blocks)
    if request.use_cache is not None:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.use_cache = request.use_cache
    if request.generation_config is not None and model.can_generate():
        model.generation_config = copy.deepcopy(request.generation_config)
    return model


def open_model(source: str, request: LoadRequest) -> tuple[Checkpoint, ClientConfig]:
    """The checkpoint with the request's settings in its config, and the client's config with the
    model's name in the swarm. Raises what ``open_checkpoint`` raises, and ConfigError."""
    checkpoint = open_checkpoint(source, request.ends.load.access)
    client = replace(request.client, dht_prefix=request.client.dht_prefix or checkpoint.model_id)
    config = copy.deepcopy(request.whole_config or checkpoint.config)
    if type(config) is not type(checkpoint.config):
        raise ConfigError(
            f"{source} is a {checkpoint.config.model_type}; config= is a {type(config).__name__}.",
            hint="Leave config out, or read it from the same model.",
        )
    # A given config may name kernels that are not installed here; they would run blocks only.
    config._attn_implementation = config._experts_implementation = None
    for name, value in request.config.items():
        if not hasattr(config, name):
            raise ConfigError(
                f"from_pretrained() does not know the option {name}.",
                hint="It takes the fields of ClientConfig and of the model's config, and arguments "
                "of transformers: dtype, device_map, revision, token, ...",
            )
        present = getattr(config, name)
        if isinstance(present, PretrainedConfig) and isinstance(value, dict):
            value = type(present)(**present.to_dict() | value)  # as transformers does
        setattr(config, name, value)
    return replace(checkpoint, config=config), client


def attach(config: PretrainedConfig, *settings: ClientConfig | TuningConfig) -> None:
    """Copy the client's settings into attributes of a model's config, as values of JSON."""
    for name, value in ((e.name, getattr(one, e.name)) for one in settings for e in fields(one)):
        if isinstance(value, (tuple, frozenset)):
            value = sorted(value) if isinstance(value, frozenset) else list(value)
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        setattr(config, name, str(value) if isinstance(value, Path) else value)


class Loadable(DistributedModel):
    """A distributed class that can be loaded, and saved as far as it was trained."""

    base_access = HubAccess()
    """Which files of its repository it was loaded from."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | None = None, **options: Any) -> Self:
        """Load a hub repository or a local folder; ``options`` as in `AutoDistributedModel`.

        Raises ModelNotSupported if the model is of another family than this class.
        """
        source = source_of(model_name_or_path, options)
        loaded: Any = load_pretrained(source, cls.kind, options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(model, cls):
            raise ModelNotSupported(
                f"{source} is a {type(model).__name__}, not a {cls.__name__}.",
                hint="AutoDistributedModelForCausalLM finds the class by itself.",
            )
        return cast(Self, loaded)  # with output_loading_info a pair

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the trained parameters only; ``from_pretrained`` of the folder continues.

        The other arguments of transformers are accepted without effect. Raises ConfigError if
        nothing requires gradients, or for ``push_to_hub``.
        """
        if options.get("push_to_hub"):
            raise ConfigError(
                "save_pretrained does not upload.", hint=f"hf upload REPOSITORY {save_directory}"
            )
        if is_main_process:
            save_tuned(self, Path(save_directory), state_dict)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles. They hold what is in this process (embeddings, head, what was
        trained, the config); the class of transformers stands for ours, which is made while
        loading. A copy shares the connection; what is unpickled makes its own at its first use.
        """
        original = type(self).__bases__[-1]
        if _classes.get(original) is not type(self):  # a user's subclass
            return super().__reduce_ex__(protocol)
        is_base = isinstance(self, DistributedBaseModel)
        return _new_instance, (original, is_base), self.__getstate__()


_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def distribute(model: PreTrainedModel, arch: ModelArch) -> PreTrainedModel:
    """Give a model whose layer list is a RemoteSequential its distributed classes."""
    base = base_within(model, arch)
    base_path = next(path for path, module in model.named_modules() if module is base)
    blocks_path = _joined(base_path, arch.layers_path)
    # Some heads (OPT's) call the innermost model and not the one around it: both intercept calls.
    for path in {"", base_path, _joined(base_path, arch.host_path)}:
        module = model.get_submodule(path)
        is_head = module is model and module is not base
        module.__class__ = distributed_class(_original(type(module)), is_base=not is_head)
        module.blocks_path = blocks_path[len(path) :].lstrip(".")
        module.host_path = _joined(base_path, arch.host_path)[len(path) :].lstrip(".")
        module.num_base_tokens = len(module.get_input_embeddings().weight)
    # Some configs (MPT's) switch the cache off; without it every token would run the whole prompt
    # again.
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.use_cache = True
    if model.can_generate():
        model.generation_config.use_cache = True
    return model


def distributed_class(original: type[PreTrainedModel], *, is_base: bool) -> type[PreTrainedModel]:
    """``DistributedXxx`` for transformers' ``Xxx``; the same class at every call.

    ``is_base``: it has the blocks itself, and its forward is the one to intercept.
    """
    if original not in _classes:
        _classes[original] = _make_class(original, is_base)
    return _classes[original]


def _new_instance(original: type[PreTrainedModel], is_base: bool) -> PreTrainedModel:
    """An instance without any attribute, to be filled by ``copy`` or ``pickle``."""
    made = distributed_class(original, is_base=is_base)
    instance: PreTrainedModel = nn.Module.__new__(made)
    return instance


def _make_class(original: type[PreTrainedModel], is_base: bool) -> type[PreTrainedModel]:
    role: type[DistributedModel] = DistributedModel
    if is_base:
        role = DistributedBaseModel
    elif issubclass(original, GenerationMixin):
        role = DistributedCausalLM
    names: dict[str, Any] = {"__module__": __name__, "__doc__": original.__doc__}
    for name in ("forward", "prepare_inputs_for_generation"):
        own = getattr(role, name, None)
        if own is not None:
            names[name] = with_signature_of(getattr(original, name), own)
    return type(f"Distributed{original.__name__}", (Loadable, role, original), names)


def _own(kind: type, config: object, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``kind``, moved out of ``options``, else read from a given config."""
    names = {entry.name for entry in fields(kind)}
    from_config = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return from_config | {name: options.pop(name) for name in names & options.keys()}


def _joined(*paths: str) -> str:
    return ".".join(path for path in paths if path)


def _original(model_class: type) -> type[PreTrainedModel]:
    """The transformers class that a loader's subclass of the same name stands for."""
    found: type[PreTrainedModel] = getattr(
        sys.modules[model_class.__module__], model_class.__name__
    )
    return found


def _dtype(given: object) -> torch.dtype | None:
    if given is None or given == "auto":
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"{given!r} is not a floating dtype.",
            hint='Use "auto", torch.float32, torch.bfloat16 or torch.float16.',
        )
    return found
