"""`python -m petals.cli.run_server`: the original's command of a server, with all its flags.

Translates what `server_flags` read into a ServerConfig; what runs is `petals serve`. Each flag is
honoured, or accepted with one warning that names its replacement. The default of --torch_dtype is
the original's (``server.block_utils.resolve_block_dtype``), not that of `petals serve`.
"""

from typing import Any

from petals import constants
from petals.cli.commands.serve import AGENT
from petals.cli.terminal.console import run_as_command, say
from petals.cli.terminal.server_flags import DROPPED, KEPT, read_flags, spelling
from petals.cli.terminal.serving import run_server
from petals.errors import ConfigError
from petals.server.config import ServerConfig
from petals.settings import build
from petals.swarm.address import Address

Flags = dict[str, Any]

_EXPIRY_PERIODS = 2.5
"""Default of --expiration, in multiples of --update_period."""


def main(arguments: list[str] | None = None) -> None:
    """Run until interrupted. Exit status as for `petals`."""
    flags = spelling(ServerConfig, KEPT)
    run_as_command(lambda: run_server(translate(read_flags(arguments))), flags)


def translate(flags: Flags) -> ServerConfig:
    """The original's flags -> ServerConfig; warns on stderr. Raises ConfigError for
    contradictions.
    """
    _warn(flags)
    values = {path: flags[flag] for flag, path in KEPT.items() if flag in flags}
    if flags.get("torch_dtype", "auto") == "auto":
        values["compute.dtype"] = "half"
    values |= _source(flags) | _network(flags) | _announcement(flags) | _moving(flags)
    return build(ServerConfig, values)


def _source(flags: Flags) -> Flags:
    model = flags.get("converted_model_name_or_path") or flags.get("model")
    if model is None:
        raise ConfigError("No model is named.", hint="run_server MODEL --initial_peers ADDR")
    token = flags.get("token") or flags.get("use_auth_token")
    return {"source.model": model, "source.token": token}


def _network(flags: Flags) -> Flags:
    values: Flags = {"network.agent": AGENT, "network.peer_memory": constants.peers_dir()}
    if flags.get("no_auto_relay"):
        values["network.relay"] = False
    if "swarm_key" not in flags:
        values["network.swarm_key"] = constants.swarm_key_file()
    port, public_ip = flags.get("port", 0), flags.get("public_ip")
    if public_ip is not None:
        if not port or flags.get("announce_maddrs"):
            raise ConfigError(
                "--public_ip needs --port, and excludes --announce_maddrs.",
                hint=f"--port 31330 --public_ip {public_ip}",
            )
        values["network.announce_maddrs"] = _announced(public_ip, port)
    if not flags.get("new_swarm") and not flags.get("initial_peers"):
        values["network.initial_peers"] = constants.initial_peers()
        if not values["network.initial_peers"]:
            raise ConfigError(
                "No swarm was named, and there is no public swarm to fall back to.",
                hint="Add --initial_peers ADDR, or --new_swarm to start one.",
            )
    return values


def _announced(host: str, port: int) -> tuple[str, ...]:
    try:
        return tuple(str(Address.listening(host, port, name)) for name in ("tcp", "quic"))
    except ValueError:
        raise ConfigError(
            f"--public_ip {host} is not an IP address.", hint="--public_ip 203.0.113.5"
        ) from None


def _announcement(flags: Flags) -> Flags:
    values: Flags = {"announce.throughput": _throughput(flags)}
    if "update_period" in flags and "expiration" not in flags:
        values["announce.expiry_seconds"] = flags["update_period"] * _EXPIRY_PERIODS
    return values


def _moving(flags: Flags) -> Flags:
    quality = flags.get("balance_quality")
    if quality is None:
        return {}
    return {"moving.policy.enough": quality} if quality else {"moving.enabled": False}


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


def _warn(flags: Flags) -> None:
    if flags.get("compression", "NONE") != "NONE":
        say(
            "warning: --compression has no effect any more: clients choose how states travel, "
            'with from_pretrained(..., wire_dtype="float16").'
        )
    for flag in DROPPED:
        if flag.name in flags:
            say(f"warning: --{flag.name} has no effect any more: {flag.instead}.")


if __name__ == "__main__":
    main()
