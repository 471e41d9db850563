"""Builds a model as transformers builds it before it reads weights: on the meta device, quantized.

Whatever transformers decides by the config (which quantizer, whether it runs here, which module
takes which tensor) is asked of transformers itself, from the config and the names of the tensors
alone. Knows nothing of spans, devices' memory or tensors' values.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    get_hf_quantizer,
)
from transformers.utils import logging as transformers_logging

from petals.errors import ModelNotSupported, PetalsError
from petals.models.checkpoint.arch import build_lock, build_on_meta
from petals.models.checkpoint.sources import Checkpoint

_NOT_IN_PARTS = {
    "torchao": "torchao keeps the layout of its tensors in the headers of the files, which "
    "transformers reads only if it loads whole files",
    "gguf": "a GGUF file is no safetensors checkpoint",
}
"""Quantization methods that transformers loads, but not from single tensors, and why."""

_QUANTIZER_ERRORS = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What quantizers raise for settings, packages, devices and tensors that they cannot use."""

_HINT = "Use an unquantized version of the model, or install what is named here."


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, ready for weights, with transformers' rules to rename tensors.

    ``quantizer`` is None for a checkpoint that is not quantized.
    """

    model: PreTrainedModel
    rules: list[Any]
    quantizer: HfQuantizer | None

    @property
    def is_dequantized(self) -> bool:
        """Whether transformers undoes the quantization while it loads, as for fp8 on CPUs."""
        return is_undone(self.quantizer)

    def match(self, keys: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """The checkpoint's ``keys`` that a parameter or buffer takes, and the others.

        The others are (key -> name in the model), without those that transformers ignores.
        """
        wanted = self.model.state_dict()
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        prefix = self.model.base_model_prefix
        taken: list[str] = []
        unused: dict[str, str] = {}
        # Some rules depend on the keys before, so the order must be that of transformers.
        for key in sorted(keys, key=dot_natural_key):
            name, _ = rename_source_key(key, renamings, converters, prefix, wanted)
            # A checkpoint saved by this transformers may already have the final names.
            if name in wanted or key in wanted:
                taken.append(key)
            else:
                unused[key] = name
        ignored = _ignored(self.model, set(unused.values()))
        return taken, {key: name for key, name in unused.items() if name not in ignored}


def build_skeleton(
    checkpoint: Checkpoint, model_class: type[PreTrainedModel], device: str = "cpu"
) -> Skeleton:
    """``model_class`` as it would be filled with the checkpoint's weights on ``device``.

    Raises ModelNotSupported, with the reason, for weights that are quantized in a way that cannot
    be loaded here; ModelFilesBroken if the class refuses the config.
    """
    quantizer = quantizer_for(checkpoint, device)
    if quantizer is None:
        model = build_on_meta(model_class, checkpoint.config)
        return Skeleton(model, get_model_conversion_mapping(model), None)
    config = copy.deepcopy(checkpoint.config)
    config.quantization_config = quantizer.quantization_config
    with build_lock, quiet_transformers(), named_reason(checkpoint, method_of(quantizer)):
        model = build_on_meta(model_class, config)
        with torch.device("meta"):
            quantizer.preprocess_model(
                model=model,
                dtype=quantizer.update_dtype(config.dtype or torch.float32),
                device_map={"": device},
                checkpoint_files=None,
                use_kernels=False,
            )
        rules = get_model_conversion_mapping(model, None, quantizer)
    return Skeleton(model, rules, quantizer)


def quantizer_for(checkpoint: Checkpoint, device: str) -> HfQuantizer | None:
    """transformers' quantizer of the checkpoint; None if the weights are not quantized.

    Raises ModelNotSupported, with the reason, for weights that cannot be loaded on ``device``.
    """
    settings = _quant_settings(checkpoint.config)
    if settings is None:
        return None
    method = _known_method(checkpoint, settings)
    config = copy.deepcopy(checkpoint.config)
    with quiet_transformers(), named_reason(checkpoint, method):
        quantizer: HfQuantizer = get_hf_quantizer(config, None, {"": device}, True, {})[0]
    return quantizer


def is_undone(quantizer: HfQuantizer | None) -> bool:
    """Whether the quantizer leaves an unquantized model."""
    return quantizer is not None and getattr(quantizer.quantization_config, "dequantize", False)


def method_of(quantizer: HfQuantizer | None) -> str:
    """The name of the quantization; "" for None."""
    found = quantizer and quantizer.quantization_config.quant_method
    return str(getattr(found, "value", found or ""))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and loading reports: our own progress and errors say it."""
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


def _quant_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization settings of a checkpoint; None if it is not quantized."""
    found: Any = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    settings: dict[str, Any] = found.to_dict()
    return settings


def _known_method(checkpoint: Checkpoint, settings: dict[str, Any]) -> str:
    """The quantization method. Raises ModelNotSupported if it cannot be loaded in any case."""
    is_bitsandbytes = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    found = settings.get("quant_method")
    method = "bitsandbytes" if is_bitsandbytes else str(getattr(found, "value", found))
    if found is None and not is_bitsandbytes:
        raise ModelNotSupported(
            f"{checkpoint.name} has a quantization_config that names no quant_method.",
            hint="Correct config.json: name the method, or remove quantization_config.",
        )
    with quiet_transformers():
        is_known = AutoHfQuantizer.supports_quant_method(settings)
    if not is_known:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise ModelNotSupported(
            f"{checkpoint.name} is quantized with {method!r}, which transformers "
            f"{transformers.__version__} cannot load.",
            hint=f"Use an unquantized version of the model, or one in a known format: {known}.",
        )
    if method in _NOT_IN_PARTS:
        raise _cannot_load(checkpoint, method, _NOT_IN_PARTS[method])
    return method


@contextmanager
def named_reason(checkpoint: Checkpoint, method: str) -> Iterator[None]:
    """Turn what a quantizer raises into ModelNotSupported with its first sentence.

    ``method`` "": the checkpoint is not quantized, and errors are left as they are.
    """
    try:
        yield
    except PetalsError:
        raise
    except _QUANTIZER_ERRORS as error:
        if not method:
            raise
        raise _cannot_load(checkpoint, method, _first_sentence(error)) from error


def _cannot_load(checkpoint: Checkpoint, method: str, reason: str) -> ModelNotSupported:
    return ModelNotSupported(
        f"The weights of {checkpoint.name} are quantized with {method} and cannot be loaded here: "
        f"{reason}.",
        hint=_HINT,
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".")


def _ignored(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those of the unused ``names`` that transformers leaves out of its report."""
    found = _Report(unexpected_keys=set(names), missing_keys=set())
    model._adjust_missing_and_unexpected_keys(found)
    return names - found.unexpected_keys


@dataclass(slots=True)
class _Report:
    """The part of transformers' loading report that its filter reads and changes."""

    unexpected_keys: set[str]
    missing_keys: set[str]
