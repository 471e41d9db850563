"""The keyword arguments of ``from_pretrained``, as users copy them from programs for transformers.

Every argument of transformers is in one of four sets: honoured (``LoadRequest`` reads it),
fulfilled (what it asks for is always so), without effect (one warning says why) or refused. A test
walks the arguments of the installed transformers. Knows no models and no files.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from petals.errors import ConfigError, NotSupported
from petals.models.checkpoint.hub import HubAccess

_OF_HUB = frozenset(entry.name for entry in fields(HubAccess))
HONOURED = _OF_HUB | {
    "config",
    "device_map",
    "dtype",
    "generation_config",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "pretrained_model_name_or_path",
    "torch_dtype",
    "use_auth_token",
}

FULFILLED = frozenset(
    {
        *("_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "low_cpu_mem_usage"),
        *("resume_download", "use_fast", "weights_only"),
    }
)
"""Only the tensors of embeddings and head are read, lazily, from safetensors, and nothing is
unpickled."""

_BLOCKS = "servers choose how blocks are computed"
_ONE_DEVICE = "embeddings and head are on one device"
_NO_CODE = "no code of a repository is run"
WITHOUT_EFFECT = {
    "allow_all_kernels": _BLOCKS,
    "attn_implementation": _BLOCKS,
    "code_revision": _NO_CODE,
    "disable_mmap": "safetensors files are read tensor by tensor",
    "experts_implementation": _BLOCKS,
    "fusion_config": _BLOCKS,
    "kernel_config": _BLOCKS,
    "max_memory": _ONE_DEVICE,
    "mirror": "transformers ignores it, too",
    "offload_buffers": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_state_dict": _ONE_DEVICE,
    "proxies": "huggingface_hub takes proxies from HTTPS_PROXY",
    "tqdm_class": "loading shows no bar",
    "use_kernels": _BLOCKS,
}
"""Argument -> why it has no effect."""

_QUANTIZED = (
    "Blocks are quantized by the servers, and embeddings and head are not quantized.",
    "Leave it out; a server's operator chooses with petals serve --quant.",
)
_DISTRIBUTED = ("The blocks are distributed over the swarm.", "Leave it out.")
_ADAPTER = ("Adapters are loaded after the model.", "Call model.load_adapter(NAME).")
_SAFETENSORS = (
    "Weights are read from safetensors files of transformers' format only.",
    "For pickles: petals models convert SOURCE TARGET.",
)
_OWN_NAMES = (
    "Servers load the blocks under the checkpoint's own names, so the client does the same.",
    "Save a copy of the checkpoint with the new names, and serve it.",
)
REFUSED = {
    "_configuration_file": ("The config is config.json.", "Put it into a folder with that name."),
    "adapter_kwargs": _ADAPTER,
    "adapter_name": _ADAPTER,
    "device_mesh": _DISTRIBUTED,
    "distributed_config": _DISTRIBUTED,
    "from_flax": _SAFETENSORS,
    "from_tf": _SAFETENSORS,
    "gguf_file": _SAFETENSORS,
    "key_mapping": _OWN_NAMES,
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "quantization_config": _QUANTIZED,
    "return_unused_kwargs": (
        "An argument that the config does not know is an error here, so none is left unused.",
        "Leave it out.",
    ),
    "state_dict": (
        "The weights are those of the checkpoint that the servers have.",
        "For other embeddings or another head: model.load_state_dict(STATE, strict=False).",
    ),
    "tp_plan": _DISTRIBUTED,
    "tp_size": _DISTRIBUTED,
    "trust_remote_code": (
        "It would run a repository's Python code here.",
        "Use a model whose code ships with transformers.",
    ),
    "use_safetensors": _SAFETENSORS,
}
"""Argument -> the reason and a hint."""

_ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {
    "adapter_name": (None, "default"),
    "use_safetensors": (None, True),
}
"""Values that are accepted in silence; of other arguments None, False and empty ones."""

_CHOSEN_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def sift(options: dict[str, Any]) -> None:
    """Remove what has no effect from ``options``, with one warning for all of it.

    Raises NotSupported for the arguments in ``REFUSED``.
    """
    for name in options.keys() & REFUSED.keys():
        if _asks(name, options.pop(name)):
            reason, hint = REFUSED[name]
            raise NotSupported(f"from_pretrained({name}=...): {reason}", hint=hint)
    for name in options.keys() & FULFILLED:
        del options[name]
    found = {name: options.pop(name) for name in sorted(options.keys() & WITHOUT_EFFECT.keys())}
    asked = [f"{name} ({WITHOUT_EFFECT[name]})" for name in found if _asks(name, found[name])]
    if asked:
        warnings.warn(f"from_pretrained: without effect: {', '.join(asked)}.", stacklevel=5)


def source_of(name: object, options: dict[str, Any]) -> str:
    """The model's name; removes transformers' name of that argument from ``options``.

    Raises ConfigError if there is none.
    """
    name = options.pop("pretrained_model_name_or_path", name)
    if name is None:
        raise ConfigError(
            "from_pretrained needs the name of a model.",
            hint="Give a repository (OWNER/NAME) or a folder.",
        )
    return str(name)


def hub_access(options: dict[str, Any]) -> HubAccess:
    """The options that say where the files are, moved out of ``options``."""
    options.setdefault("token", options.pop("use_auth_token", None))
    found = {name: options.pop(name) for name in _OF_HUB & options.keys()}
    return HubAccess(**{name: value for name, value in found.items() if value is not None})


_OF_PEFT_ALONE = frozenset(
    {
        *("autocast_adapter_dtype", "ephemeral_gpu_offload", "hotswap", "load_config"),
        *("low_cpu_mem_usage", "proxies", "repo_type", "torch_device", "use_safetensors"),
    }
)
"""Arguments of peft's ``load_adapter`` that say how its own layers are made."""


def adapter_access(options: dict[str, Any]) -> HubAccess:
    """Where an adapter's files are, from the options of ``load_adapter``.

    Raises ConfigError for others, apart from those that say how peft makes its own layers.
    """
    options = options | (options.get("adapter_kwargs") or {})
    options.pop("adapter_kwargs", None)
    access = hub_access(options)
    refused = {
        name for name in options if name not in _OF_PEFT_ALONE and _asks(name, options[name])
    }
    if refused:
        raise ConfigError(
            f"load_adapter() does not take {', '.join(sorted(refused))}.",
            hint="It takes a folder or repository of peft, is_trainable, revision, token, "
            "cache_dir, subfolder, local_files_only and force_download.",
        )
    return access


def device_of(device_map: object) -> str:
    """The device of embeddings and head. Raises ConfigError unless ``device_map`` names one."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, Mapping):
        devices = {device_of(device) for device in device_map.values()}
        if len(devices) != 1:
            raise ConfigError(
                f"device_map names {len(devices)} devices; embeddings and head are on one.",
                hint='Name one, for example device_map="cuda:0". Blocks are on the servers.',
            )
        return devices.pop()
    accelerator = torch.accelerator.current_accelerator()
    if device_map in _CHOSEN_BY_ACCELERATE:
        return "cpu" if accelerator is None else accelerator.type
    if isinstance(device_map, int) and accelerator is not None:
        device_map = f"{accelerator.type}:{device_map}"
    try:
        device = torch.device(device_map)
        torch.empty(1, device=device).item()  # fails if there is no such device here
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"device_map={device_map!r} is not a device of this machine.",
            hint='Embeddings and head can be on "cpu" or on an accelerator, for example "cuda:0".',
        ) from error
    return str(device)


def _asks(name: str, value: object) -> bool:
    if name in _ASKS_FOR_NOTHING:
        return value not in _ASKS_FOR_NOTHING[name]
    is_empty = isinstance(value, str | Mapping | list | tuple) and not value
    return value is not None and value is not False and not is_empty
