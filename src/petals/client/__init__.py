"""The reader's side: a model's two ends here, its blocks on servers.

Names that old scripts import from here are found at first use. Must not import anything itself.
"""

from importlib import import_module

_HOMES = {
    "ClientConfig": "petals.client.config",
    "InferenceSession": "petals.client.model.inference_session",
    "RemoteSequenceManager": "petals.client.routing.sequence_manager",
    "RemoteSequential": "petals.client.model.remote_sequential",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'petals.client' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
