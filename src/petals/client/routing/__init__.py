"""Which servers a session or pass uses: the swarm as this client knows it, and decisions over it.

Sends no steps.

The names that old scripts import from this package are imported at their first use.
"""

from importlib import import_module

_HOMES = {
    "NoSpendingPolicy": "petals.client.routing.spending_policy",
    "RemoteSequenceManager": "petals.client.routing.sequence_manager",
    "SpendingPolicyBase": "petals.client.routing.spending_policy",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'petals.client.routing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
