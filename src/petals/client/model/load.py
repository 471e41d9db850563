"""Loading a model whose blocks stay on servers, and the classes it wears.

A loaded model is the real class of transformers under a subclass made on the spot:
`DistributedLlamaForCausalLM` is a `LlamaForCausalLM`. Must not know routes or sessions, nor any
architecture by name.
"""

import contextlib
import copy
import functools
import os
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from petals.client.config import ClientConfig
from petals.client.model.distributed import DistributedModel, RemoteForward, check_token_ids
from petals.client.model.generation import RemoteGeneration
from petals.client.model.remote_sequential import RemoteSequential
from petals.client.model.swarm_runner import SwarmRunner
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.tuning.prompts import TuningConfig, add_prompts
from petals.client.tuning.saved import find_tuned, save_tuned
from petals.errors import ConfigError, ModelNotSupported, NotSupported
from petals.models.checkpoint.arch import ModelArch, build_on_meta
from petals.models.checkpoint.sources import Checkpoint, HubAccess, open_checkpoint
from petals.models.loading.head import EndsKind, EndsOptions, base_within, load_ends
from petals.models.loading.split import LoadOptions
from petals.types import BlockSpan

_WITHOUT_MEANING = frozenset(
    {"low_cpu_mem_usage", "use_safetensors", "attn_implementation", "use_cache", "use_fast"}
)
"""Accepted and not needed: weights are always read lazily, from safetensors, the ends only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Keyword arguments of ``from_pretrained``, sorted. ``config`` are the model's own settings."""

    client: ClientConfig
    tuning: TuningConfig = field(default_factory=TuningConfig)
    ends: EndsOptions = field(default_factory=EndsOptions)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, options: dict[str, Any]) -> "LoadRequest":
        """Raises ConfigError and NotSupported for options that cannot be honoured."""
        options = dict(options)
        given = options.pop("config", None)
        client = ClientConfig.of(_own(ClientConfig, given, options))
        tuning = TuningConfig(**_own(TuningConfig, given, options))
        token = options.pop("use_auth_token", None)
        access = HubAccess(
            revision=options.pop("revision", None),
            token=options.pop("token", token),
            cache_dir=options.pop("cache_dir", None),
        )
        dtype = _dtype(options.pop("dtype", options.pop("torch_dtype", None)))
        chunked = options.pop("use_chunked_forward", "auto")
        ends = EndsOptions(
            load=LoadOptions(dtype=dtype, access=access),
            chunked=None if chunked == "auto" else bool(chunked),
            chunk_rows=options.pop("chunked_forward_step", EndsOptions().chunk_rows),
        )
        _refuse(options)
        return cls(client=client, tuning=tuning, ends=ends, config=options)


def load_pretrained(source: str, kind: EndsKind, options: dict[str, Any]) -> PreTrainedModel:
    """A hub repository, a local folder, or a folder of ``save_pretrained``: then the model it was
    trained on, with what was trained. Raises what ``load_distributed`` and `tuned` do."""
    saved = find_tuned(source)
    if saved is None:
        return load_distributed(source, kind, LoadRequest.read(options))
    model = load_distributed(saved.base, kind, LoadRequest.read(saved.options | options))
    saved.restore(model)
    return model


def load_distributed(source: str, kind: EndsKind, request: LoadRequest) -> PreTrainedModel:
    """The model of ``kind`` with its ends here and its blocks in the swarm.

    Nothing is asked of the swarm before the first use. Raises ModelNotFound, ModelNotSupported,
    PickleCheckpointRefused, ModelFilesBroken, ConfigError.
    """
    checkpoint, client = open_model(source, request)
    archs: list[ModelArch] = []

    def make_remote(arch: ModelArch, config: PretrainedConfig) -> nn.Module:
        attach(config, client, request.tuning)
        archs.append(arch)
        runner = SwarmRunner(RemoteSequenceManager(client, BlockSpan(0, arch.num_blocks)))
        blocks = RemoteSequential(config, runner=runner)
        blocks.returns_tuple = layers_return_tuple(arch, checkpoint.config)
        return blocks

    model: Any = distribute(load_ends(checkpoint, kind, make_remote, request.ends), archs[0])
    add_prompts(model.blocks_host, request.tuning, archs[0].num_blocks)
    return model


def open_model(source: str, request: LoadRequest) -> tuple[Checkpoint, ClientConfig]:
    """The model's files with the request's settings in its config, and the client's config, which
    then names the model in the swarm. Raises what ``open_checkpoint`` does, and ConfigError."""
    checkpoint = open_checkpoint(source, request.ends.load.access)
    client = replace(request.client, dht_prefix=request.client.dht_prefix or checkpoint.model_id)
    config = copy.deepcopy(checkpoint.config)
    for name, value in request.config.items():
        if not hasattr(config, name):
            raise ConfigError(
                f"from_pretrained() does not know the option {name}.",
                hint="It takes the fields of ClientConfig and of the model's config, dtype, "
                "revision, token and cache_dir.",
            )
        setattr(config, name, value)
    return replace(checkpoint, config=config), client


def attach(config: PretrainedConfig, *settings: Any) -> None:
    """Show the client's settings as attributes of a model's config, in values JSON can hold."""
    for name, value in ((e.name, getattr(one, e.name)) for one in settings for e in fields(one)):
        if isinstance(value, (tuple, frozenset)):
            value = sorted(value) if isinstance(value, frozenset) else list(value)
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        setattr(config, name, str(value) if isinstance(value, Path) else value)


class Loadable:
    """Mixin: a distributed class loads itself, and saves what was trained."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> Self:
        """Load a hub repository or a local folder; ``options`` as in `AutoDistributedModel`.

        Raises ModelNotSupported if the model is of another family than this class.
        """
        model = load_pretrained(str(model_name_or_path), cls._kind(), options)
        if not isinstance(model, cls):
            raise ModelNotSupported(
                f"{model_name_or_path} is a {type(model).__name__}, not a {cls.__name__}.",
                hint="AutoDistributedModelForCausalLM finds the class by itself.",
            )
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write what was trained here, and that alone; ``from_pretrained`` of the folder goes on.

        The other arguments of transformers are accepted and mean nothing for so small a file.
        Raises ConfigError if nothing requires gradients, or for ``push_to_hub``.
        """
        if options.get("push_to_hub"):
            raise ConfigError(
                "save_pretrained does not upload.", hint=f"hf upload REPOSITORY {save_directory}"
            )
        if is_main_process:
            save_tuned(self, Path(save_directory), state_dict)

    @classmethod
    def _kind(cls) -> EndsKind:
        if issubclass(cls, RemoteForward):
            return EndsKind.BASE
        causal = issubclass(cls, RemoteCausalLM)
        return EndsKind.CAUSAL_LM if causal else EndsKind.SEQUENCE_CLASSIFICATION


class RemoteCausalLM(RemoteGeneration, DistributedModel):
    """A causal language model whose `generate` runs through the swarm."""

    def check_token_ids(self: Any, ids: Tensor) -> None:
        """Raises BadInput for an empty prompt and for ids outside the vocabulary."""
        check_token_ids(ids, self.get_input_embeddings())


_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def distribute(model: PreTrainedModel, arch: ModelArch) -> PreTrainedModel:
    """Give a model whose layer list is a RemoteSequential the classes that drive it."""
    base = base_within(model, arch)
    base_path = next(path for path, module in model.named_modules() if module is base)
    blocks_path = _joined(base_path, arch.layers_path)
    # Some heads call the innermost model and pass by the one around it (OPT's): both catch calls.
    for path in {"", base_path, _joined(base_path, arch.host_path)}:
        module: Any = model.get_submodule(path)
        is_head = module is model and module is not base
        module.__class__ = distributed_class(_original(type(module)), catches=not is_head)
        module.blocks_path = blocks_path[len(path) :].lstrip(".")
        module.host_path = _joined(base_path, arch.host_path)[len(path) :].lstrip(".")
    # Some configs (MPT's) switch the cache off; without it every token would cost a whole prompt.
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.use_cache = True
    if model.can_generate():
        model.generation_config.use_cache = True
    return model


def distributed_class(original: type[PreTrainedModel], *, catches: bool) -> type[PreTrainedModel]:
    """``DistributedXxx`` for transformers' ``Xxx``; the same class at every call.

    ``catches``: it has the blocks itself, and its forward is the one to catch.
    """
    if original not in _classes:
        _classes[original] = _make_class(original, catches)
    return _classes[original]


def _make_class(original: type[PreTrainedModel], catches: bool) -> type[PreTrainedModel]:
    names: dict[str, Any] = {"__module__": __name__, "__doc__": original.__doc__}
    role: type = RemoteCausalLM if issubclass(original, GenerationMixin) else DistributedModel
    if catches:
        role = RemoteForward
    # transformers reads these signatures to learn what a model accepts.
    for name in ("forward", "prepare_inputs_for_generation"):
        if hasattr(role, name):
            names[name] = _with_signature_of(getattr(original, name), getattr(role, name))
    return type(f"Distributed{original.__name__}", (Loadable, role, original), names)


def _with_signature_of(original: Any, caught: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return caught(self, *args, **kwargs)

    return method


def layers_return_tuple(arch: ModelArch, config: PretrainedConfig) -> bool:
    """Whether the architecture's layers answer ``(hidden, ...)``: asked of one, without memory."""
    base = build_on_meta(arch.base_class, config).to(torch.bfloat16).eval()
    answers: list[bool] = []

    class Answered(Exception):
        pass

    def look(layer: nn.Module, inputs: Any, output: Any) -> None:
        answers.append(isinstance(output, tuple))
        raise Answered

    host = base.get_submodule(arch.host_path)
    base.get_submodule(arch.layers_path)[0].register_forward_hook(look)
    width = host.get_input_embeddings().embedding_dim
    with torch.no_grad(), torch.device("meta"), contextlib.suppress(Answered):
        host(
            inputs_embeds=torch.zeros(1, 1, width, dtype=torch.bfloat16),
            attention_mask=torch.ones(1, 1, dtype=torch.int64),
            use_cache=False,
        )
    return answers[0]


def _own(kind: Any, config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``kind``: from ``options``, which lose them, else from a config at hand."""
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


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or given == "auto":
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"{given!r} is not a floating dtype.",
            hint='Use "auto", torch.float32, torch.bfloat16 or torch.float16.',
        )
    return found


def _refuse(options: dict[str, Any]) -> None:
    """Drop what needs nothing; refuse what this version cannot do."""
    for name in _WITHOUT_MEANING & options.keys():
        del options[name]
    if options.pop("trust_remote_code", False):
        raise NotSupported(
            "trust_remote_code would run a repository's Python code here.",
            hint="Use a model whose code ships with transformers.",
        )
