"""Everything an operator can choose about a server, in groups, checked on construction.

Imports neither torch nor a network engine, so that a command line can build it quickly.
"""

from dataclasses import dataclass, field

from petals.constants import DTYPE_NAMES
from petals.errors import ConfigError
from petals.server.policies import MovePolicy, SchedulerConfig
from petals.swarm.config import MIB, NodeConfig
from petals.types import BlockSpan, ModelId

QUANT_NAMES = ("auto", "none", "int8", "bnb-int8", "nf4")
DEVICE_NAMES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """The source of the model.

    model: a repository or folder. name: replaces the model's own name in the directory. adapters:
    repositories or folders of LoRA adapters that every client may use.
    """

    model: str
    name: ModelId | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """Device and precision.

    dtype: "auto" is bf16 for half-precision checkpoints where that is fastest on this machine, else
    f32; "int8" is f32 with int8 matrices. quant: "auto" is int8 where that is fastest.
    num_threads: None leaves cores that other programs use to them.
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
    """Memory budgets.

    cache_tokens: KV cache in tokens of each block; or cache_bytes: in bytes of all blocks; both
    None: as much as fits, at most 16384 tokens. outbox_bytes: outputs kept in host memory, from
    which a failed hop behind this one can be refilled; None: as many tokens as the cache, at most a
    quarter of the free memory. training_bytes: activations that passes save for their backward;
    None: a quarter of the free memory, at most 1 GiB. check_integrity: compare the accounts of the
    KV cache with its memory whenever the compute thread is idle, and end the server if they differ
    (for tests).
    """

    cache_tokens: int | None = None
    cache_bytes: int | None = None
    outbox_bytes: int | None = None
    training_bytes: int | None = None
    check_integrity: bool = False

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
    """Limits of one request.

    max_length: tokens per row; None: what the model and the cache allow. max_step_tokens: tokens of
    one step or pass. max_rows: rows of one session. allow_training: whether gradients are computed.
    """

    max_length: int | None = None
    max_step_tokens: int = 8192
    max_rows: int = 256
    allow_training: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Limits of one client.

    lease_seconds: how long a session is kept after its client's last message, an adapter after its
    last use, and the saved activations of a pass after its forward. max_alloc_seconds: longest wait
    for KV memory. max_sessions_per_peer: open sessions. max_bytes_per_peer: states that wait or run
    on this server. max_adapter_bytes_per_peer, max_adapter_bytes: adapters of one client, of all
    clients. replay_chunk_tokens: most tokens in one message of a replay.
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
    """The server's record in the directory.

    throughput: in blocks * tokens / s; None: measured. period_seconds: time between announcements.
    expiry_seconds: life of a record that is not renewed.
    """

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
    """Whether and when a server that chose its blocks itself moves to others.

    propagation_seconds: time after which every peer has read a changed record, caches included.
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
    """One server.

    blocks: the span to serve; None: the server chooses ``num_blocks`` (None: as many as fit).
    drain_seconds: longest wait for its sessions to be migrated when it leaves.
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
