"""What is played: a swarm, the steps of a user, and the faults that strike them."""

from dataclasses import dataclass

from petals.client.config import ClientConfig
from petals.swarm.failover_config import FailoverConfig
from support.simulation.faults import Fault

MAX_LENGTH = 48
FAILOVER = FailoverConfig(
    check_integrity=True,
    hung_seconds=2.0,
    link_retry_seconds=3.0,
    max_ban_seconds=20.0,
    link_dial_seconds=1.0,
    link_rest_seconds=0.5,
    silence_seconds=1.0,
    send_seconds=2.0,
    migration_max_pause_seconds=2.0,
    parts_ahead=2,
    replay_link_idle_seconds=5.0,
)

LAYOUTS: dict[str, tuple[tuple[int, int, float], ...]] = {
    # (first block, end, blocks per second)
    "one hop": ((0, 3, 1000.0), (0, 3, 900.0)),
    "two hops": ((0, 2, 1000.0), (2, 4, 1000.0), (0, 2, 900.0), (2, 4, 900.0)),
    "three hops": (
        (0, 1, 1000.0),
        (1, 3, 1000.0),
        (3, 4, 1000.0),
        (0, 1, 900.0),
        (1, 3, 900.0),
        (3, 4, 900.0),
    ),
    "one spare for all": ((0, 2, 1000.0), (2, 4, 1000.0), (0, 4, 9.0)),
    "no spares": ((0, 2, 1000.0), (2, 4, 1000.0)),
    "overlapping": ((0, 3, 1000.0), (3, 4, 1000.0), (1, 4, 700.0), (0, 2, 700.0), (2, 4, 600.0)),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A step. New row r continues old row ``order[r]`` (None: the rows stay), loses its last
    ``cuts[r]`` tokens and gets ``counts[r]`` new ones.
    """

    counts: tuple[int, ...]
    cuts: tuple[int, ...] = (0,)
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rest:
    """The user does nothing."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fork:
    """The user forks the session and goes on with the copy; if there are two of them already, with
    the other one.
    """


Event = Turn | Rest | Fork | Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The swarm, and how the client and the servers are set up. 0 bytes: without limit."""

    layout: str = "two hops"
    num_rows: int = 2
    is_direct: bool = True
    has_max_length: bool = True
    latencies: int = 0
    kept_bytes: int = 0
    log_bytes: int = 0
    has_kv_format: bool = True
    chunk_tokens: int = 4


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is played."""

    setting: Setting
    events: tuple[Event, ...]


def client_config(setting: Setting) -> ClientConfig:
    """How the client of a swarm is set up: impatient, so that little virtual time passes."""
    return ClientConfig(
        initial_peers=(),
        show_route=False,
        use_server_to_server=setting.is_direct,
        connect_timeout=2.0,
        request_timeout=6.0,
        alloc_timeout=2.0,
        silence_timeout=1.0,
        step_timeout=0.3,
        repair_timeout=8.0,
        max_kept_bytes=setting.kept_bytes or 1 << 30,
        update_period=20.0,
        max_retries=3,
        min_backoff=0.2,
        max_backoff=1.0,
        ban_timeout=2.0,
        ping_timeout=1.0,
        prefill_chunk_tokens=setting.chunk_tokens,
        failover=FAILOVER,
    )
