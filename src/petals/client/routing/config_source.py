"""Following the client's settings in an object whose attributes may change, such as model.config.

Knows no network.
"""

from dataclasses import fields, replace
from typing import Any

from petals.client.config import ClientConfig
from petals.errors import ConfigError

FIXED_FIELDS = (
    "initial_peers",
    "swarm_key",
    "dht_prefix",
    "silence_timeout",
    "max_kept_bytes",
    "ban_timeout",
    "daemon_startup_timeout",
    "failover",
)
"""Fields of which the connection is made: they can be set only before it is made."""


class ConfigSource:
    """The attributes of ``source`` that are fields of ClientConfig."""

    def __init__(self, source: object) -> None:
        self.source = source
        self._seen = self._values()

    def read(self, config: ClientConfig) -> ClientConfig:
        """``config`` with the attributes that were set since the last look; the same object if none
        was. Raises ConfigError for a value that is not allowed, and for a field that is fixed.
        """
        values = self._values()
        if values == self._seen:
            return config
        changed = {name: value for name, value in values.items() if value != self._seen[name]}
        for name in FIXED_FIELDS:
            if name in changed:
                raise ConfigError(
                    f"{name} was set after the connection to the swarm was made.",
                    hint=f"Load the model again with {name}=...; timeouts, retries, the adapter "
                    "and the lists of servers can be set at any time.",
                )
        # The warning about daemon_startup_timeout was given when the first config was made.
        config = replace(config, **({"daemon_startup_timeout": None} | changed))
        self._seen = values
        return config

    def _values(self) -> dict[str, Any]:
        """Copies, so that a list that is changed in place is noticed."""
        found = {entry.name: getattr(self.source, entry.name, None) for entry in _FIELDS}
        return {
            name: list(value) if isinstance(value, list) else value for name, value in found.items()
        }


_FIELDS = fields(ClientConfig)
