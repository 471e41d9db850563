"""`python -m petals.cli.run_server`: the old command of a server, with all its flags.

Translates what `server_flags` read into a ServerConfig; what runs is `petals serve`. Each flag is
honoured, or accepted with one warning that names its replacement.
"""

from typing import TYPE_CHECKING, Any

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.console import run_as_command, say
from petals.cli.terminal.server_flags import DROPPED, read_flags
from petals.cli.terminal.serving import run_server
from petals.errors import ConfigError
from petals.types import BlockSpan, ModelId

if TYPE_CHECKING:
    from petals.server.config import AnnounceConfig, MovingConfig, ServerConfig
    from petals.swarm.config import NodeConfig

Flags = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Run until interrupted. Exit status as for `petals`."""
    run_as_command(lambda: run_server(translate(read_flags(arguments))))


def translate(flags: Flags) -> "ServerConfig":
    """Old flags -> ServerConfig; warns on stderr. Raises ConfigError for contradictions."""
    from petals.server.config import (
        ClientLimits,
        ComputeConfig,
        LimitsConfig,
        MemoryConfig,
        ServerConfig,
        SourceConfig,
    )

    _warn(flags)
    model = flags.get("converted_model_name_or_path") or flags.get("model")
    if model is None:
        raise ConfigError("No model is named.", hint="run_server MODEL --initial_peers ADDR")
    prefix, blocks = flags.get("dht_prefix"), flags.get("block_indices")
    return ServerConfig(
        source=SourceConfig(
            model=model,
            name=None if prefix is None else ModelId(prefix),
            revision=flags.get("revision"),
            token=flags.get("token") or flags.get("use_auth_token"),
            cache_dir=flags.get("cache_dir"),
            adapters=tuple(flags.get("adapters", ())),
        ),
        blocks=None if blocks is None else BlockSpan.parse(blocks),
        num_blocks=flags.get("num_blocks"),
        network=_network(flags),
        compute=ComputeConfig(
            device=flags.get("device", "auto"),
            dtype=flags.get("torch_dtype", "auto"),
            quant=flags.get("quant_type", "none"),
        ),
        memory=MemoryConfig(cache_tokens=flags.get("attn_cache_tokens")),
        limits=LimitsConfig(
            max_length=flags.get("inference_max_length"),
            **_given(flags, max_step_tokens="max_batch_size"),
        ),
        door=ClientLimits(
            **_given(flags, lease_seconds="step_timeout", max_alloc_seconds="max_alloc_timeout")
        ),
        announce=_announcement(flags),
        moving=_moving(flags),
    )


def _network(flags: Flags) -> "NodeConfig":
    from petals.swarm.config import NodeConfig

    port, public_ip = flags.get("port", 0), flags.get("public_ip")
    announced = tuple(flags.get("announce_maddrs", ()))
    if public_ip is not None:
        if not port or announced:
            raise ConfigError(
                "--public_ip needs --port, and excludes --announce_maddrs.",
                hint=f"--port 31330 --public_ip {public_ip}",
            )
        announced = (f"/ip4/{public_ip}/tcp/{port}", f"/ip4/{public_ip}/udp/{port}/quic-v1")
    peers = () if flags.get("new_swarm") else tuple(flags.get("initial_peers", ()))
    if not peers and not flags.get("new_swarm"):
        peers = constants.initial_peers()
    if not peers and not flags.get("new_swarm"):
        raise ConfigError(
            "No swarm was named, and there is no public swarm to fall back to.",
            hint="Add --initial_peers ADDR, or --new_swarm to start one.",
        )
    return NodeConfig(
        initial_peers=peers,
        port=port,
        host_maddrs=tuple(flags.get("host_maddrs", ())),
        announce_maddrs=announced,
        identity_path=flags.get("identity_path"),
        swarm_key=options.read_swarm_key(flags.get("swarm_key")),
        peer_memory=constants.peers_dir(),
        relay=False if flags.get("no_auto_relay") else None,
        agent="petals-server",
    )


def _announcement(flags: Flags) -> "AnnounceConfig":
    from petals.server.config import AnnounceConfig

    period = flags.get("update_period")
    timing: dict[str, Any] = _given(flags, expiry_seconds="expiration")
    if period is not None:
        timing = {"period_seconds": period, "expiry_seconds": period * 2.5, **timing}
    return AnnounceConfig(
        public_name=flags.get("public_name"), throughput=_throughput(flags), **timing
    )


def _moving(flags: Flags) -> "MovingConfig":
    from petals.server.config import MovingConfig
    from petals.server.policies import MovePolicy

    eagerness: dict[str, Any] = _given(flags, look_seconds="mean_balance_check_period")
    quality = flags.get("balance_quality")
    if quality:
        eagerness["enough"] = quality
    return MovingConfig(enabled=quality != 0, policy=MovePolicy(**eagerness))


def _throughput(flags: Flags) -> float | None:
    given = flags.get("throughput", "auto")
    if given in ("auto", "eval"):
        return None
    try:
        return float(given)
    except ValueError:
        raise ConfigError(
            f"--throughput {given} is not known.",
            hint="Give a number, auto or eval; petals models plan replaces dry_run.",
        ) from None


def _given(flags: Flags, **names: str) -> dict[str, Any]:
    """Arguments for those flags that were typed; the others keep their defaults."""
    return {field: flags[flag] for field, flag in names.items() if flag in flags}


def _warn(flags: Flags) -> None:
    for flag in DROPPED:
        if flag.name in flags:
            say(f"warning: --{flag.name} has no effect any more: {flag.instead}.")


if __name__ == "__main__":
    main()
