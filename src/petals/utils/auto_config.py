"""The original's import path of the auto classes, which are in ``client.model.auto``."""

from petals.client.model.auto import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedSpeculativeModel,
)
from petals.errors import NotSupported

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedSpeculativeModel",
    "register_model_classes",
]


def register_model_classes(**classes: object) -> None:
    """Raises NotSupported: a model's classes are made from those of transformers."""
    raise NotSupported(
        "Classes of an architecture are not registered any more.",
        hint="Register them with transformers (AutoConfig.register, AutoModel.register); the auto "
        "classes of Petals find them there.",
    )
