"""Everything an operator can choose about a server, in groups, checked when it is written down.

Loads neither torch nor an engine, so that a command line can build it in no time.
"""

from dataclasses import dataclass, field

from petals.constants import DTYPE_NAMES
from petals.errors import ConfigError
from petals.server.policies import MovePolicy, SchedulerConfig
from petals.swarm.config import MIB, NodeConfig
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan, ModelId

QUANT_NAMES = ("auto", "none", "int8", "bnb-int8", "nf4")
DEVICE_NAMES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where the model is from. ``name`` replaces its own name in the directory.

    ``adapters`` are folders or repositories of LoRA adapters that every client may ask for.
    """

    model: str
    name: ModelId | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How to compute.

    ``dtype`` "auto" keeps half-precision checkpoints in bf16 where that is fastest here and uses
    f32 otherwise; "int8" is f32 with int8 matrices. ``quant`` "auto" takes int8 where it is
    fastest. ``num_threads`` None leaves busy cores to others.
    """

    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.device.partition(":")[0] not in DEVICE_NAMES:
            raise _unknown("device", self.device, DEVICE_NAMES)
        if self.dtype not in (*DTYPE_NAMES, "int8"):
            raise _unknown("dtype", self.dtype, (*DTYPE_NAMES, "int8"))
        if self.quant not in QUANT_NAMES:
            raise _unknown("quantization", self.quant, QUANT_NAMES)
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError("A server needs at least one thread.", hint="Say --threads 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The KV budget: ``cache_tokens`` per block, or ``cache_bytes`` in all; None: what fits.

    ``outbox_bytes`` is for the outputs that sessions may be repaired from; None: as many tokens as
    the cache holds. ``training_bytes`` is for what passes keep for their way back; None: a
    quarter of what is free, at most 1 GiB.
    """

    cache_tokens: int | None = None
    cache_bytes: int | None = None
    outbox_bytes: int | None = None
    training_bytes: int | None = None

    def __post_init__(self) -> None:
        for value in (self.cache_tokens, self.cache_bytes):
            if value is not None and value < 1:
                raise ConfigError(
                    "A server without cache can serve nobody.", hint="Give it at least a page."
                )
        if self.training_bytes is not None and self.training_bytes < 0:
            raise ConfigError(
                "Memory for training cannot be negative.", hint="0 keeps nothing between halves."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """The most one request may ask for; ``max_length`` None: what the model and the cache allow.

    ``max_step_tokens`` is for one step or pass, ``max_rows`` for one session. ``allow_training``
    False: no gradients for anybody.
    """

    max_length: int | None = None
    max_step_tokens: int = 8192
    max_rows: int = 256
    allow_training: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """How much one client may take, and how long we wait for it.

    ``max_alloc_seconds`` caps what a client may wait for cache. ``lease_seconds``: how long a
    session outlives its client's last sign of life, an adapter its last use, and what is kept of a
    pass its forward half. ``max_adapter_bytes`` is what clients' adapters may take in all.
    ``replay_chunk_tokens``: the most that is replayed to a successor at once.
    """

    lease_seconds: float = 60.0
    max_alloc_seconds: float = 600.0
    max_sessions_per_peer: int = 64
    max_bytes_per_peer: int = 512 * MIB
    max_adapter_bytes_per_peer: int = 256 * MIB
    max_adapter_bytes: int = 1024 * MIB
    replay_chunk_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceConfig:
    """What the directory says of us. ``throughput`` (blocks * tokens / s) None: measured."""

    public_name: str | None = None
    throughput: float | None = None
    period_seconds: float = 20.0
    expiry_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.expiry_seconds <= self.period_seconds:
            raise ConfigError(
                "Announcements would expire before they are renewed.",
                hint="Make the expiration at least twice the update period.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingConfig:
    """Whether a server that chose its blocks itself may go to others later, and how eagerly.

    ``propagation_seconds``: how long DRAINING needs to be read by everybody, records being cached.
    """

    enabled: bool = True
    policy: MovePolicy = MovePolicy()
    propagation_seconds: float = 45.0

    def __post_init__(self) -> None:
        if self.policy.look_seconds <= 0:
            raise ConfigError(
                "A server cannot look at the swarm all the time.",
                hint="Say --rebalance-every 60, or --no-rebalance.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server: ``blocks``, or how many (``num_blocks``; None: as many as fit) to choose.

    ``drain_seconds``: how long it stays for the sessions it has when it leaves.
    """

    source: SourceConfig
    blocks: BlockSpan | None = None
    num_blocks: int | None = None
    network: NodeConfig = field(default_factory=NodeConfig)
    compute: ComputeConfig = ComputeConfig()
    memory: MemoryConfig = MemoryConfig()
    limits: LimitsConfig = LimitsConfig()
    door: ClientLimits = ClientLimits()
    scheduling: SchedulerConfig = SchedulerConfig()
    announce: AnnounceConfig = AnnounceConfig()
    moving: MovingConfig = field(default_factory=MovingConfig)
    failover: FailoverConfig = FailoverConfig()
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.blocks is not None and self.num_blocks is not None:
            raise ConfigError(
                "Both the blocks and their number are given.",
                hint="--blocks 0:10 names them; --num-blocks 10 lets the server choose which.",
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError("A server holds at least one block.", hint="Say --num-blocks 1.")


def _unknown(what: str, name: str, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(f"There is no {what} {name!r}.", hint=f"Choose one of {', '.join(known)}.")
