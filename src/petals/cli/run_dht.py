"""`python -m petals.cli.run_dht`: the original's command of a bootstrap peer, with all its flags.

Translates flags into a NodeConfig; what runs is `petals bootstrap`.
"""

import argparse
import asyncio
from typing import Any

from petals import constants
from petals.cli.commands.bootstrap import AGENT, run_bootstrap
from petals.cli.terminal.console import run_as_command, say
from petals.cli.terminal.server_flags import field_flags, spelling
from petals.errors import ConfigError
from petals.settings import build
from petals.swarm.config import NodeConfig

_KEPT = ("initial_peers", "host_maddrs", "announce_maddrs", "identity_path", "swarm_key")
"""Flags that are fields of NodeConfig, under the same name."""

_REFRESH_SECONDS = 30
"""The original's default of --refresh_period."""


def build_parser() -> argparse.ArgumentParser:
    """All flags of the original's run_dht, and --swarm_key."""
    parser = argparse.ArgumentParser(
        prog="python -m petals.cli.run_dht",
        description="Run a bootstrap peer; the original's form of petals bootstrap.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    for flag, kind in field_flags(NodeConfig, {name: name for name in _KEPT}).items():
        add(f"--{flag}", **kind)
    add("--no_relay", action="store_true", help="never use circuit relays")
    add("--use_auto_relay", action="store_true", help="look for relays when behind a NAT")
    add("--use_ipfs", action="store_true", help="refused: no public network is used")
    add("--refresh_period", type=int, help="no effect: the swarm refreshes itself")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run until interrupted. Exit status as for `petals`."""
    flags = vars(build_parser().parse_args(arguments))
    names = spelling(NodeConfig, {name: name for name in _KEPT})
    run_as_command(lambda: asyncio.run(run_bootstrap(translate(flags))), names)


def translate(flags: dict[str, Any]) -> NodeConfig:
    """The original's flags -> NodeConfig; warns on stderr. Raises ConfigError."""
    if flags.get("use_ipfs"):
        raise ConfigError(
            "--use_ipfs would join the public IPFS network, which Petals no longer uses.",
            hint="Leave it out; peers of a swarm relay for each other.",
        )
    if flags.get("refresh_period", _REFRESH_SECONDS) != _REFRESH_SECONDS:
        say("warning: --refresh_period has no effect; records expire and refresh by themselves.")
    return build(
        NodeConfig,
        {
            "swarm_key": constants.swarm_key_file(),
            **{name: flags[name] for name in _KEPT if name in flags},
            "use_relay": not flags.get("no_relay", False),
            "relay": None if flags.get("use_auto_relay") else False,
            "agent": AGENT,
        },
    )


if __name__ == "__main__":
    main()
