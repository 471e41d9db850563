"""The settings of a client: which swarm, which servers, which timeouts.

The field names of the original Petals are kept; each is honoured, or accepted with one warning that
names the replacement. The environment is read when a config is made. Must not know torch or the
network.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from petals import constants
from petals.errors import ConfigError
from petals.settings import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Setting,
    Settings,
    WholeNumber,
)
from petals.swarm.failover_config import SILENCE_SECONDS, FailoverConfig
from petals.types import PeerId

DEFAULT_MAX_RETRIES = 3
"""Number of further attempts where ``max_retries`` is None (the original's default: no limit)."""


def _addresses(given: Iterable[object] | None) -> tuple[str, ...]:
    """One text of addresses, several texts, or objects whose ``str`` is an address; None: those of
    the environment.
    """
    if given is None:
        return constants.initial_peers()
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Iterable):
        return tuple(" ".join(map(str, given)).replace(",", " ").split())
    raise ConfigError("initial_peers is a list of addresses.", hint='["/ip4/…/tcp/…/p2p/…"]')


def _peer_ids(given: Iterable[object] | str | None) -> frozenset[PeerId] | None:
    if given is None:
        return None
    if isinstance(given, str):
        raise ConfigError("Servers are given as a list of peer ids.", hint='["12D3KooW…"]')
    return frozenset(PeerId(str(peer)) for peer in given)


def _failover(given: object) -> object:
    """The failover config of a model's config, which is JSON, as an object again."""
    return FailoverConfig(**given) if isinstance(given, Mapping) else given


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig(Settings):
    """Settings of everything that a client does in a swarm. Times are in seconds.

    Raises ConfigError for a value that is not allowed.
    """

    initial_peers: Annotated[
        tuple[str, ...],
        Setting(
            "Address of a member of the swarm; may be repeated.",
            "--join",
            "ADDR",
            env=constants.ENV_INITIAL_PEERS,
            parse=_addresses,
        ),
    ] = field(default_factory=constants.initial_peers)
    swarm_key: Annotated[
        Path | None,
        Setting("Key file of a closed swarm.", "--swarm-key", "FILE", env=constants.ENV_SWARM_KEY),
    ] = field(default_factory=constants.swarm_key_file)
    dht_prefix: Annotated[
        str | None,
        Setting(
            "Name under which the model is announced, if it is not its repository's.",
            "--name",
            "NAME",
        ),
    ] = None
    show_route: Annotated[
        bool | Literal["inference"],
        Setting("Log routes: of sessions (inference), of sessions and training (True), or none."),
    ] = "inference"
    allowed_servers: Annotated[
        frozenset[PeerId] | None,
        Setting(
            "Peer id of a server to use, and no others; may be repeated.",
            "--allow-server",
            "PEER",
            parse=_peer_ids,
        ),
    ] = None
    blocked_servers: Annotated[
        frozenset[PeerId] | None,
        Setting(
            "Peer id of a server that is never used; may be repeated.",
            "--block-server",
            "PEER",
            parse=_peer_ids,
        ),
    ] = None
    use_server_to_server: Annotated[
        bool,
        Setting("Hops send states to each other; otherwise all states pass through the client."),
    ] = True
    connect_timeout: Annotated[
        PositiveFloat,
        Setting(
            "Time limit for opening a stream to a server. A server that has answered before gets "
            "at most silence_timeout."
        ),
    ] = 5.0
    request_timeout: Annotated[
        PositiveFloat,
        Setting("Time limit for the answer to one request.", "--request-timeout", "SECONDS"),
    ] = 180.0
    alloc_timeout: Annotated[
        NonNegativeFloat,
        Setting(
            "How long a session waits for KV memory on a full server.", "--alloc-timeout", "SECONDS"
        ),
    ] = 10.0
    silence_timeout: Annotated[
        PositiveFloat,
        Setting(
            "A server that owes an answer and sends nothing for this long, not even a heartbeat, "
            "is replaced."
        ),
    ] = SILENCE_SECONDS
    step_timeout: Annotated[
        PositiveFloat,
        Setting(
            "Minimum time before a step without an answer is repeated through the client; the "
            "effective limit is max(step_timeout, 4 x the expected time of the step)."
        ),
    ] = 1.0
    repair_timeout: Annotated[
        NonNegativeFloat,
        Setting("How long a session waits for a server to replace one it has lost."),
    ] = 60.0
    max_kept_bytes: Annotated[
        WholeNumber,
        Setting(
            "Memory for the inputs of all sessions, from which a lost first hop is refilled. A "
            "session that does not fit survives the loss of other hops only."
        ),
    ] = 2 * 1024**3
    wire_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Setting(
            "Precision in which states and gradients travel. auto: the client's own. A narrower "
            "one halves the traffic and rounds at every server."
        ),
    ] = "auto"
    update_period: Annotated[
        PositiveFloat,
        Setting("Age at which the records of the servers are read again."),
    ] = 60.0
    max_retries: Annotated[
        WholeNumber | None,
        Setting(
            f"Further attempts after the first when servers fail; {DEFAULT_MAX_RETRIES} if it is "
            "not given.",
            "--max-retries",
            "N",
            env=constants.ENV_MAX_RETRIES,
        ),
    ] = field(default_factory=constants.max_retries)
    min_backoff: Annotated[
        NonNegativeFloat,
        Setting("Pause before the third attempt; it doubles with each further one."),
    ] = 1.0
    max_backoff: Annotated[NonNegativeFloat, Setting("Longest pause between two attempts.")] = 60.0
    ban_timeout: Annotated[
        PositiveFloat,
        Setting("How long a failed server is not used; doubled with each further failure."),
    ] = 15.0
    active_adapter: Annotated[
        str | None,
        Setting("Adapter that the servers apply, by name.", "--adapter", "NAME"),
    ] = None
    max_pinged: Annotated[
        WholeNumber, Setting("How many servers of each block are measured when records are read.")
    ] = 3
    ping_timeout: Annotated[PositiveFloat, Setting("Time limit for measuring one server.")] = 2.0
    prefill_chunk_tokens: Annotated[
        PositiveInt,
        Setting("Longer steps are cut into pieces of this many tokens, so that hops overlap."),
    ] = 512
    daemon_startup_timeout: Annotated[
        float | None, Setting("Without effect; accepted with a warning.")
    ] = None
    failover: Annotated[
        FailoverConfig, Setting("Further limits and waiting times of failover.", parse=_failover)
    ] = FailoverConfig()

    def check(self) -> None:
        """Warn of what has no effect."""
        if self.daemon_startup_timeout is not None:
            warnings.warn(
                "daemon_startup_timeout is not needed any more: the node starts or fails by itself "
                "within seconds; connect_timeout is how long a peer may take to answer.",
                FutureWarning,
                stacklevel=4,
            )

    @property
    def num_retries(self) -> int:
        """Further attempts after the first; always finite."""
        return DEFAULT_MAX_RETRIES if self.max_retries is None else self.max_retries

    def backoff_seconds(self, num_failures: int) -> float:
        """Pause (s) before the attempt that follows ``num_failures`` failures: 0 after the first,
        then min(min_backoff x 2^(num_failures - 2), max_backoff).
        """
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
