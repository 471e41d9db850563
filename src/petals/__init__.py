"""Petals: one large language model on the machines of many people.

The public names; each is imported at its first use, so that `import petals` takes milliseconds and
does not import torch. Contains nothing else. With the first of them, a program that has imported
hivemind gets the logs that the original gave it.
"""

from importlib import import_module

from petals.imports import collector_at_rest
from petals.logs import show_with_hivemind

__version__ = "3.0.0.dev0"

_FAMILIES = ("Bloom", "Falcon", "Llama", "Mixtral")
_KINDS = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")

_HOMES: dict[str, str] = {
    "AutoDistributedConfig": "petals.client.model.auto",
    "AutoDistributedModel": "petals.client.model.auto",
    "AutoDistributedModelForCausalLM": "petals.client.model.auto",
    "AutoDistributedModelForSequenceClassification": "petals.client.model.auto",
    "AutoDistributedSpeculativeModel": "petals.client.model.auto",
    "ClientConfig": "petals.client.config",
    "DistributedLlamaForSpeculativeGeneration": "petals.client.model.legacy",
    "InferenceSession": "petals.client.model.inference_session",
    "LoraConfig": "petals.models.adapters.config",
    "NoSpendingPolicy": "petals.client.routing.spending_policy",
    "PetalsError": "petals.errors",
    "RemoteLora": "petals.client.tuning.lora",
    "RemoteSequenceManager": "petals.client.routing.sequence_manager",
    "RemoteSequential": "petals.client.model.remote_sequential",
    "SpendingPolicyBase": "petals.client.routing.spending_policy",
    "declare_active_modules": "petals.utils.dht",
    "get_remote_module_infos": "petals.utils.dht",
    "register_model_classes": "petals.utils.auto_config",
    **{f"Wrapped{family}Block": "petals.client.model.legacy" for family in _FAMILIES},
    **{
        f"Distributed{family}{kind}": "petals.client.model.legacy"
        for family in _FAMILIES
        for kind in _KINDS
    },
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name from its home at first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'petals' has no attribute {name!r}")
    if not globals().keys() & _HOMES.keys():
        show_with_hivemind()
    with collector_at_rest():
        value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
