"""Settings of clients in tests: a fault costs no pause that a test would have to wait for."""

from dataclasses import fields
from typing import Any

from petals.client.config import ClientConfig
from petals.swarm.failover_config import FailoverConfig

QUICK = {
    "min_backoff": 0.0,
    "request_timeout": 10.0,
    "repair_timeout": 0.1,
    "failover": FailoverConfig(check_integrity=True),
}


def client_options(**options: Any) -> dict[str, Any]:
    """Fields of ClientConfig from such fields and fields of its FailoverConfig."""
    names = {field.name for field in fields(FailoverConfig)} & options.keys()
    failover = {name: options.pop(name) for name in names}
    if failover:
        options["failover"] = FailoverConfig(**{"check_integrity": True, **failover})
    return options


def config(**options: Any) -> ClientConfig:
    """A client's settings, without a swarm to join unless ``initial_peers`` say so."""
    return ClientConfig(**{"initial_peers": (), **QUICK, **client_options(**options)})
