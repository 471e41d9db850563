"""`python -m petals.cli.run_dht`: the old command of a bootstrap peer, with all its flags.

Translates flags into a NodeConfig; what runs is `petals bootstrap`.
"""

import argparse
import asyncio
from pathlib import Path

from petals.cli.commands.bootstrap import run_bootstrap
from petals.cli.terminal.console import run_as_command, say
from petals.cli.terminal.options import read_swarm_key
from petals.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """All flags of the old run_dht, and --swarm_key."""
    parser = argparse.ArgumentParser(prog="python -m petals.cli.run_dht", description=__doc__)
    add = parser.add_argument
    add(
        "--initial_peers", nargs="*", default=[], help="peers of the swarm to join; none: a new one"
    )
    add("--host_maddrs", nargs="+", default=[], help="multiaddresses to listen on")
    add("--announce_maddrs", nargs="+", default=[], help="multiaddresses that others should dial")
    add("--use_ipfs", action="store_true", help="refused: no public network is used")
    add("--identity_path", type=Path, help="private key file, so that the peer id stays the same")
    add("--no_relay", action="store_true", help="never use circuit relays")
    add("--use_auto_relay", action="store_true", help="look for relays when behind a NAT")
    add("--refresh_period", type=int, default=30, help="accepted; the swarm refreshes itself")
    add("--swarm_key", type=Path, help="key file of a closed swarm")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run until interrupted. Exit status as for `petals`."""
    options = build_parser().parse_args(arguments)
    run_as_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from petals.swarm.config import NodeConfig

    if options.use_ipfs:
        raise ConfigError(
            "--use_ipfs would join the public IPFS network, which Petals no longer uses.",
            hint="Leave it out; peers of a swarm relay for each other.",
        )
    if options.refresh_period != 30:
        say("warning: --refresh_period has no effect; records expire and refresh by themselves.")
    config = NodeConfig(
        initial_peers=tuple(options.initial_peers),
        host_maddrs=tuple(options.host_maddrs),
        announce_maddrs=tuple(options.announce_maddrs),
        identity_path=options.identity_path,
        swarm_key=read_swarm_key(options.swarm_key),
        use_relay=not options.no_relay,
        relay=None if options.use_auto_relay else False,
        agent="petals-bootstrap",
    )
    asyncio.run(run_bootstrap(config))


if __name__ == "__main__":
    main()
