"""The client: embeddings and head of a model in this process, its blocks on servers.

The names that old scripts import from this package are imported at their first use.
"""

from importlib import import_module

_HOMES = {
    "ClientConfig": "petals.client.config",
    "InferenceSession": "petals.client.model.inference_session",
    "NoSpendingPolicy": "petals.client.routing.spending_policy",
    "RemoteSequenceManager": "petals.client.routing.sequence_manager",
    "RemoteSequential": "petals.client.model.remote_sequential",
    "SpendingPolicyBase": "petals.client.routing.spending_policy",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'petals.client' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
