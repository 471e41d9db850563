"""`petals serve`: hold some blocks of a model and run them for whoever asks.

Turns options into a ServerConfig and runs the server; knows nothing of how it works.
"""

from typing import Annotated

import typer

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.lifetime import stop_when_stdin_closes
from petals.cli.terminal.serving import run_server
from petals.types import BlockSpan, ModelId

BlocksOption = Annotated[
    str | None, typer.Option("--blocks", metavar="A:B", help="Exactly these blocks.")
]
NumBlocks = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="How many; which ones is chosen.")
]
Quant = Annotated[
    str, typer.Option(metavar="KIND", help="none, auto, int8, bnb-int8 or nf4 weights.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest session, in tokens.")
]
CacheTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="KV memory, in tokens per block.")
]
TrainingCache = Annotated[
    int | None,
    typer.Option(min=0, metavar="MIB", help="Memory for what training keeps between the halves."),
]
NoTraining = Annotated[
    bool, typer.Option("--no-training", help="Give no gradients; only generate and read.")
]
Lease = Annotated[
    float,
    typer.Option(
        min=0.1, metavar="SECONDS", help="How long a session outlives its client's last sign."
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="How long sessions may take to go elsewhere."),
]
Rebalance = Annotated[
    bool,
    typer.Option("--rebalance/--no-rebalance", help="Move to blocks that need it more."),
]
RebalanceEvery = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="How often to look for such blocks.")
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="NameOption of the model in the directory, if another.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters",
        metavar="LORA",
        help="A LoRA adapter (repository or folder) that clients may ask for; may be repeated.",
    ),
]


def serve(
    model: options.ModelArgument,
    join: options.Join = None,
    blocks: BlocksOption = None,
    num_blocks: NumBlocks = None,
    dtype: options.Dtype = "auto",
    quant: Quant = "none",
    device: Device = "auto",
    threads: Threads = None,
    max_length: MaxLength = None,
    cache_tokens: CacheTokens = None,
    training_cache: TrainingCache = None,
    no_training: NoTraining = False,
    lease: Lease = 60.0,
    drain_seconds: DrainSeconds = 60.0,
    rebalance: Rebalance = True,
    rebalance_every: RebalanceEvery = 60.0,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    name: NameOption = None,
    adapters: Adapters = None,
    public_name: Annotated[str | None, typer.Option(help="Shown by petals status.")] = None,
    host: options.Host = "0.0.0.0",
    port: options.Port = 0,
    announce: options.Announce = None,
    relay: options.Relay = None,
    identity: options.IdentityFile = None,
    swarm_key: options.SwarmKeyFile = None,
    ready_file: options.ReadyFile = None,
    until_stdin_closes: options.UntilStdinCloses = False,
) -> None:
    """Serve blocks of MODEL; without --join, as the first peer of a new swarm."""
    from petals.server.config import (
        AnnounceConfig,
        ClientLimits,
        ComputeConfig,
        LimitsConfig,
        MemoryConfig,
        MovingConfig,
        ServerConfig,
        SourceConfig,
    )
    from petals.server.policies import MovePolicy
    from petals.swarm.config import MIB, NodeConfig

    if until_stdin_closes:
        stop_when_stdin_closes()
    config = ServerConfig(
        source=SourceConfig(
            model=model,
            name=None if name is None else ModelId(name),
            revision=revision,
            adapters=tuple(adapters or ()),
        ),
        blocks=None if blocks is None else BlockSpan.parse(blocks),
        num_blocks=num_blocks,
        network=NodeConfig(
            initial_peers=tuple(join or ()),
            host=host,
            port=port,
            announce_maddrs=tuple(announce or ()),
            relay=relay,
            identity_path=identity,
            swarm_key=options.read_swarm_key(swarm_key),
            peer_memory=constants.peers_dir(),
            agent="petals-server",
        ),
        compute=ComputeConfig(device=device, dtype=dtype, quant=quant, num_threads=threads),
        memory=MemoryConfig(
            cache_tokens=cache_tokens,
            training_bytes=None if training_cache is None else training_cache * MIB,
        ),
        limits=LimitsConfig(max_length=max_length, allow_training=not no_training),
        door=ClientLimits(lease_seconds=lease),
        announce=AnnounceConfig(public_name=public_name),
        moving=MovingConfig(enabled=rebalance, policy=MovePolicy(look_seconds=rebalance_every)),
        drain_seconds=drain_seconds,
    )
    run_server(config, ready_file)
