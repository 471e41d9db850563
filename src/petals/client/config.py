"""What a client can be told: which swarm, which servers, how patient.

The old Petals field names are kept; each is honoured, or accepted with one warning that names the
replacement. The environment is read when a config is made. Must not know torch or the network.
"""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from petals import constants
from petals.errors import ConfigError
from petals.swarm.failover_config import SILENCE_SECONDS, FailoverConfig
from petals.types import PeerId

DEFAULT_MAX_RETRIES = 3
"""Used where ``max_retries`` is None. Old clients went on forever; nobody waits that long."""

_POSITIVE = (
    "connect_timeout",
    "request_timeout",
    "update_period",
    "ping_timeout",
    "ban_timeout",
    "silence_timeout",
    "step_timeout",
    "prefill_chunk_tokens",
)
_NOT_NEGATIVE = (
    "alloc_timeout",
    "repair_timeout",
    "max_kept_bytes",
    "min_backoff",
    "max_backoff",
    "max_pinged",
    "max_retries",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Settings of everything a client does in a swarm. Times are in seconds.

    ``initial_peers``: multiaddresses of any members (environment: PETALS_INITIAL_PEERS).
    ``swarm_key``: file with the key of a private swarm (environment: PETALS_SWARM_KEY).
    ``dht_prefix``: the name a model is announced under, where it is not the repository's.
    ``show_route``: log the routes of sessions ("inference"), of everything (True) or none (False).
    ``allowed_servers`` / ``blocked_servers``: peer ids to use only, or never.
    ``connect_timeout`` is for opening a stream (to a server that has answered before at most
    ``silence_timeout``), ``request_timeout`` for one answer, ``alloc_timeout`` for waiting until a
    full server has room.
    ``max_retries``: further attempts after the first when peers fail (environment:
    PETALS_MAX_RETRIES); ``min_backoff`` and ``max_backoff`` bound the pauses between them.
    ``ban_timeout``: how long a failed server is avoided, doubled with each further failure.
    ``update_period``: age at which what is known of the servers is read anew; ``max_pinged`` of
    them per block are then measured, waiting ``ping_timeout``.
    ``prefill_chunk_tokens``: longer steps are cut so that hops work on them one behind the other.
    ``use_server_to_server``: hops hand states to each other; else all pass through the client.
    ``silence_timeout``: a server that is asked for something and gives no sign of life for so long
    is replaced.
    ``step_timeout``: after so long at least (four times what such a step took, if that is more)
    a step that nobody answers is repeated through the client, hop by hop.
    ``repair_timeout``: how long a session waits for somebody to serve what it has lost.
    ``max_kept_bytes``: memory for what sessions have sent to their first hops, from which these are
    replaced; a session that does not fit survives the loss of other hops only.
    ``failover``: all further limits and waiting times of failover.
    Raises ConfigError for values that make no sense.
    """

    initial_peers: tuple[str, ...] = field(default_factory=constants.initial_peers)
    swarm_key: Path | None = field(default_factory=constants.swarm_key_file)
    dht_prefix: str | None = None
    show_route: bool | Literal["inference"] = "inference"
    allowed_servers: frozenset[PeerId] | None = None
    blocked_servers: frozenset[PeerId] | None = None
    use_server_to_server: bool = True
    connect_timeout: float = 5.0
    request_timeout: float = 180.0
    alloc_timeout: float = 10.0
    silence_timeout: float = SILENCE_SECONDS
    step_timeout: float = 1.0
    repair_timeout: float = 60.0
    max_kept_bytes: int = 2 * 1024**3
    update_period: float = 60.0
    max_retries: int | None = field(default_factory=constants.max_retries)
    min_backoff: float = 1.0
    max_backoff: float = 60.0
    ban_timeout: float = 15.0
    active_adapter: str | None = None
    max_pinged: int = 3
    ping_timeout: float = 2.0
    prefill_chunk_tokens: int = 512
    daemon_startup_timeout: float | None = None
    failover: FailoverConfig = FailoverConfig()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "initial_peers", _addresses(self.initial_peers))
        put(self, "swarm_key", Path(self.swarm_key).expanduser() if self.swarm_key else None)
        put(self, "allowed_servers", _peer_ids(self.allowed_servers))
        put(self, "blocked_servers", _peer_ids(self.blocked_servers))
        if isinstance(self.failover, Mapping):  # out of a model's config, which is JSON
            put(self, "failover", FailoverConfig(**self.failover))
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name not in _NOT_NEGATIVE)):
                raise ConfigError(f"{name}={value} makes no sense.", hint="Give a positive number.")
        if self.daemon_startup_timeout is not None:
            warnings.warn(
                "daemon_startup_timeout is not needed any more: the node starts or fails by itself "
                "within seconds; connect_timeout is how long a peer may take to answer.",
                FutureWarning,
                stacklevel=3,
            )

    @property
    def num_retries(self) -> int:
        """Further attempts after the first; always finite."""
        return DEFAULT_MAX_RETRIES if self.max_retries is None else self.max_retries

    def backoff_seconds(self, num_failures: int) -> float:
        """Pause before the attempt after ``num_failures`` failures: none, then doubling."""
        if num_failures <= 1:
            return 0.0
        return float(min(self.min_backoff * 2.0 ** min(num_failures - 2, 32), self.max_backoff))

    @classmethod
    def take_from(cls, options: dict[str, Any]) -> Self:
        """A config from keyword arguments; those that are its own leave ``options``."""
        own = {f.name: options.pop(f.name) for f in fields(cls) if f.name in options}
        return cls(**own)

    @classmethod
    def of(cls, source: object) -> "ClientConfig":
        """The config in ``source``: itself, a mapping, or an object's attributes of these names."""
        if isinstance(source, ClientConfig):
            return source
        if isinstance(source, Mapping):
            return cls.take_from(dict(source))
        named = [f.name for f in fields(cls) if hasattr(source, f.name)]
        return cls(**{name: getattr(source, name) for name in named})


def _addresses(given: str | os.PathLike[str] | Iterable[object] | None) -> tuple[str, ...]:
    """One address, several, or objects that print as addresses."""
    if given is None:
        return constants.initial_peers()
    if isinstance(given, str):
        return tuple(given.replace(",", " ").split())
    if isinstance(given, Iterable):
        return tuple(str(address) for address in given)
    raise ConfigError("initial_peers is a list of addresses.", hint='["/ip4/…/tcp/…/p2p/…"]')


def _peer_ids(given: Iterable[object] | str | None) -> frozenset[PeerId] | None:
    if given is None:
        return None
    if isinstance(given, str):
        raise ConfigError("Servers are given as a list of peer ids.", hint='["12D3KooW…"]')
    return frozenset(PeerId(str(peer)) for peer in given)
