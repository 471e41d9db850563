"""The settings of a server, in groups, checked when they are made.

Loads neither torch nor an engine, so that a command line can be built from it quickly.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from petals.errors import ConfigError
from petals.server.policies import MovePolicy, SchedulerConfig
from petals.settings import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Setting,
    Settings,
    WholeNumber,
)
from petals.swarm.config import MIB, NodeConfig
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan, ModelId

DtypeName = Literal["auto", "half", "float32", "bfloat16", "float16", "int8"]
QuantName = Literal["none", "auto", "int8", "bnb-int8", "nf4"]
DeviceName = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]


def _span(given: object) -> object:
    """``"0:10"`` in place of the span."""
    return BlockSpan.parse(given) if isinstance(given, str) else given


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(Settings):
    """Where the model and its adapters are from."""

    model: Annotated[str, Setting("A Hugging Face repository or a local folder.", "MODEL")]
    name: Annotated[
        ModelId | None,
        Setting("Name of the model in the directory, if another than its own.", "--name", "NAME"),
    ] = None
    revision: Annotated[
        str | None, Setting("Revision of the repository.", "--revision", "REVISION")
    ] = None
    token: Annotated[
        str | bool | None,
        Setting("Hugging Face access token; by default the one of HF_TOKEN or of a login."),
    ] = None
    cache_dir: Annotated[
        str | None,
        Setting("Folder of downloaded files, if not Hugging Face's own.", "--cache-dir", "FOLDER"),
    ] = None
    adapters: Annotated[
        tuple[str, ...],
        Setting(
            "A LoRA adapter (repository or folder) that clients may ask for; may be repeated.",
            "--adapters",
            "LORA",
        ),
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig(Settings):
    """How to compute."""

    device: Annotated[
        DeviceName, Setting("auto, cpu, cuda, cuda:N or mps.", "--device", "DEVICE")
    ] = "auto"
    dtype: Annotated[
        DtypeName,
        Setting(
            "Precision of weights and states. auto: half-precision checkpoints in bfloat16 where "
            "that is fastest, float32 otherwise; half: the checkpoint's own 16-bit precision, "
            "bfloat16 for float32 checkpoints; int8: float32 with int8 weights.",
            "--dtype",
            "DTYPE",
        ),
    ] = "auto"
    quant: Annotated[
        QuantName,
        Setting("Quantization of the weights; auto: int8 where it is fastest.", "--quant", "KIND"),
    ] = "none"
    num_threads: Annotated[
        PositiveInt | None,
        Setting("CPU threads; by default as many as there are idle cores.", "--threads", "N"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig(Settings):
    """How much memory sessions and training may take."""

    cache_tokens: Annotated[
        PositiveInt | None,
        Setting("KV memory, in tokens per block; by default what fits.", "--cache-tokens", "N"),
    ] = None
    cache_bytes: Annotated[
        PositiveInt | None,
        Setting(
            "KV memory of all blocks, in place of --cache-tokens.",
            "--cache-memory",
            "MIB",
            scale=MIB,
        ),
    ] = None
    outbox_bytes: Annotated[
        WholeNumber | None,
        Setting(
            "Memory for outputs from which a session's next hop is refilled; by default as many "
            "tokens as the KV memory holds.",
            "--output-log",
            "MIB",
            scale=MIB,
        ),
    ] = None
    training_bytes: Annotated[
        WholeNumber | None,
        Setting(
            "Memory for activations between the forward and the backward pass; by default a "
            "quarter of what is free, at most 1 GiB. 0 keeps nothing and computes again.",
            "--training-cache",
            "MIB",
            scale=MIB,
        ),
    ] = None
    check_integrity: Annotated[
        bool,
        Setting(
            "Compare the accounts of sessions and of the KV memory with the rows whenever the "
            "server is idle, and stop it if they differ (for tests).",
            "--check-integrity/--no-check-integrity",
        ),
    ] = False

    def check(self) -> None:
        """Raises ConfigError if the KV memory is given twice."""
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise ConfigError(
                "Both cache_tokens and cache_bytes are given.",
                hint="--cache-tokens counts tokens per block, --cache-memory MiB in all: give one.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig(Settings):
    """The most that one request may ask for."""

    max_length: Annotated[
        PositiveInt | None,
        Setting(
            "Longest session, in tokens; by default what the model and the KV memory allow.",
            "--max-length",
            "N",
        ),
    ] = None
    max_step_tokens: Annotated[
        PositiveInt,
        Setting("Most tokens in one step or training pass.", "--max-step-tokens", "N"),
    ] = 8192
    max_rows: Annotated[
        PositiveInt, Setting("Most sequences in one session.", "--max-rows", "N")
    ] = 256
    allow_training: Annotated[
        bool, Setting("Compute gradients for clients.", "--training/--no-training")
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits(Settings):
    """How much one client may take, and how long the server keeps it."""

    lease_seconds: Annotated[
        PositiveFloat,
        Setting(
            "How long a session outlives its client's last frame, an adapter its last use, and "
            "kept activations their forward pass.",
            "--lease",
            "SECONDS",
        ),
    ] = 60.0
    max_alloc_seconds: Annotated[
        NonNegativeFloat,
        Setting("Longest time that a client may wait for KV memory.", "--max-alloc", "SECONDS"),
    ] = 600.0
    max_sessions_per_peer: Annotated[
        PositiveInt, Setting("Sessions of one client.", "--max-sessions-per-client", "N")
    ] = 64
    max_bytes_per_peer: Annotated[
        PositiveInt, Setting("Memory for one client's requests and prompts.")
    ] = 512 * MIB
    max_adapter_bytes_per_peer: Annotated[
        PositiveInt, Setting("Memory for one client's adapters.")
    ] = 256 * MIB
    max_adapter_bytes: Annotated[
        PositiveInt,
        Setting("Memory for the adapters that clients send.", "--adapter-memory", "MIB", scale=MIB),
    ] = 1024 * MIB
    replay_chunk_tokens: Annotated[
        PositiveInt, Setting("Most tokens that are sent to a replacement server at once.")
    ] = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceConfig(Settings):
    """What the directory says of the server."""

    public_name: Annotated[
        str | None, Setting("Name that petals status shows.", "--public-name", "NAME")
    ] = None
    throughput: Annotated[
        NonNegativeFloat | None,
        Setting(
            "Throughput to announce, in blocks x tokens/s; by default measured at the start.",
            "--throughput",
            "RATE",
        ),
    ] = None
    period_seconds: Annotated[
        PositiveFloat,
        Setting("Period of renewing the announcement.", "--announce-every", "SECONDS"),
    ] = 20.0
    expiry_seconds: Annotated[
        PositiveFloat,
        Setting("Lifetime of an announcement that is not renewed.", "--announce-for", "SECONDS"),
    ] = 60.0

    def check(self) -> None:
        """Raises ConfigError if announcements would expire before they are renewed."""
        if self.expiry_seconds <= self.period_seconds:
            raise ConfigError(
                f"Announcements would expire (expiry_seconds={self.expiry_seconds:g}) before they "
                f"are renewed (period_seconds={self.period_seconds:g}).",
                hint="Make the lifetime at least twice the period.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingConfig(Settings):
    """Whether a server that chose its blocks itself may move to others later."""

    enabled: Annotated[
        bool,
        Setting(
            "Move to blocks that need it more; never from blocks given by --blocks.",
            "--rebalance/--no-rebalance",
        ),
    ] = True
    policy: Annotated[MovePolicy, Setting("Moving to other blocks")] = MovePolicy()
    propagation_seconds: Annotated[
        NonNegativeFloat,
        Setting("Time until all readers of the directory, who cache records, see a change."),
    ] = 45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(Settings):
    """One server."""

    source: Annotated[SourceConfig, Setting("Model")]
    blocks: Annotated[
        BlockSpan | None,
        Setting("Serve exactly these blocks.", "--blocks", "A:B", parse=_span),
    ] = None
    num_blocks: Annotated[
        PositiveInt | None,
        Setting(
            "How many blocks, which the server chooses; by default as many as fit into memory.",
            "--num-blocks",
            "N",
        ),
    ] = None
    network: Annotated[NodeConfig, Setting("Network")] = field(default_factory=NodeConfig)
    compute: Annotated[ComputeConfig, Setting("Computing")] = ComputeConfig()
    memory: Annotated[MemoryConfig, Setting("Memory")] = MemoryConfig()
    limits: Annotated[LimitsConfig, Setting("Limits of a request")] = LimitsConfig()
    clients: Annotated[ClientLimits, Setting("Limits of a client")] = ClientLimits()
    scheduling: Annotated[SchedulerConfig, Setting("Scheduling")] = SchedulerConfig()
    announce: Annotated[AnnounceConfig, Setting("Announcement")] = AnnounceConfig()
    moving: Annotated[MovingConfig, Setting("Moving to other blocks")] = MovingConfig()
    failover: Annotated[FailoverConfig, Setting("Limits and waiting times of failover.")] = (
        FailoverConfig()
    )
    drain_seconds: Annotated[
        NonNegativeFloat,
        Setting(
            "Time limit for handing sessions over to other servers when this one leaves.",
            "--drain-seconds",
            "SECONDS",
        ),
    ] = 60.0

    def check(self) -> None:
        """Raises ConfigError if the blocks are given twice."""
        if self.blocks is not None and self.num_blocks is not None:
            raise ConfigError(
                "Both the blocks and their number are given.",
                hint="--blocks 0:10 names them; --num-blocks 10 lets the server choose which.",
            )
