"""Class names of the original Petals for one family, like `DistributedBloomForCausalLM`.

Each is the class that the auto classes load, made at first use, or the class of a block in
transformers (`WrappedBloomBlock`). Has no behaviour of its own.
"""

from importlib import import_module
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from petals.client.model.auto import AutoDistributedConfig, AutoDistributedSpeculativeModel
from petals.client.model.load import distributed_class
from petals.errors import ConfigError, ModelNotSupported
from petals.models.checkpoint.arch import base_class_of, describe
from petals.models.loading.head import HeadKind, class_for

FAMILIES = {"Bloom": "bloom", "Falcon": "falcon", "Llama": "llama", "Mixtral": "mixtral"}
_BLOCKS = {
    "WrappedBloomBlock": "bloom.modeling_bloom.BloomBlock",
    "WrappedFalconBlock": "falcon.modeling_falcon.FalconDecoderLayer",
    "WrappedLlamaBlock": "llama.modeling_llama.LlamaDecoderLayer",
    "WrappedMixtralBlock": "mixtral.modeling_mixtral.MixtralDecoderLayer",
}
_KINDS = {
    "ForCausalLM": HeadKind.CAUSAL_LM,
    "ForSequenceClassification": HeadKind.SEQUENCE_CLASSIFICATION,
}
_found: dict[str, type] = {}


class _FamilyConfig(type):
    """Makes ``isinstance(config, DistributedLlamaConfig)`` true of every config of the family."""

    family: type[PretrainedConfig]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.family)


class _ConfigOfFamily(metaclass=_FamilyConfig):
    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> PretrainedConfig:
        """As AutoDistributedConfig. Raises ModelNotSupported for a model of another family."""
        config = AutoDistributedConfig.from_pretrained(model_name_or_path, **options)
        if not isinstance(config, cls.family):
            raise ModelNotSupported(
                f"{model_name_or_path} is of type {config.model_type}.",
                hint="AutoDistributedConfig finds the class by itself.",
            )
        return config


class _LlamaForSpeculativeGeneration(type):
    """``DistributedLlamaForSpeculativeGeneration(config, small_model)``, as old scripts call it."""

    def __call__(cls, config: PretrainedConfig, small_model: PreTrainedModel) -> PreTrainedModel:
        """The model that ``config`` was read from, with ``small_model`` drafting."""
        source = getattr(config, "name_or_path", "")
        if not source:
            raise ConfigError(
                "This config does not say which model it belongs to.",
                hint="Read it with AutoDistributedConfig.from_pretrained(NAME, ...).",
            )
        return AutoDistributedSpeculativeModel.from_pretrained(
            source, config=config, small_model=small_model
        )

    def __instancecheck__(cls, instance: object) -> bool:
        is_llama = isinstance(instance, _model_class("llama", HeadKind.CAUSAL_LM))
        return is_llama and getattr(instance, "small_model", None) is not None


class DistributedLlamaForSpeculativeGeneration(metaclass=_LlamaForSpeculativeGeneration):
    """A Llama whose tokens a small model drafts."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> PreTrainedModel:
        """As AutoDistributedSpeculativeModel."""
        return AutoDistributedSpeculativeModel.from_pretrained(model_name_or_path, **options)


def __getattr__(name: str) -> type:
    found = _found.get(name) or _make(name)
    if found is None:
        raise AttributeError(f"module 'petals.client.model.legacy' has no attribute {name!r}")
    _found[name] = found
    return found


def _make(name: str) -> type | None:
    if name in _BLOCKS:
        module, _, block = _BLOCKS[name].rpartition(".")
        found: type = getattr(import_module(f"transformers.models.{module}"), block)
        return found
    for family, model_type in FAMILIES.items():
        prefix = f"Distributed{family}"
        suffix = name.removeprefix(prefix)
        if name == f"{prefix}Config":
            attributes = {"family": CONFIG_MAPPING[model_type], "__module__": __name__}
            return _FamilyConfig(name, (_ConfigOfFamily,), attributes)
        if name == f"{prefix}Model":
            return _model_class(model_type, HeadKind.BASE)
        if suffix in _KINDS and name.startswith(prefix):
            return _model_class(model_type, _KINDS[suffix])
    return None


def _model_class(model_type: str, kind: HeadKind) -> type[PreTrainedModel]:
    config = CONFIG_MAPPING[model_type]()
    if kind is HeadKind.BASE:
        return distributed_class(base_class_of(config), is_base=True)
    return distributed_class(class_for(kind, config, describe(config)), is_base=False)
