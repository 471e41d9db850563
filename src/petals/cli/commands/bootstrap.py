"""`petals bootstrap`: a peer without blocks, through which others join.

Runs a node of the swarm layer and nothing else.
"""

import asyncio
import signal
from pathlib import Path

from petals.cli.terminal import options
from petals.cli.terminal.console import print_data, say
from petals.cli.terminal.lifetime import listed_as_running, stop_when_stdin_closes, write_ready_file
from petals.imports import collector_at_rest
from petals.swarm.config import NodeConfig

AGENT = "petals-bootstrap"


@options.with_config(NodeConfig, fixed={"agent": AGENT})
def bootstrap(
    config: NodeConfig,
    ready_file: options.ReadyFile = None,
    until_stdin_closes: options.UntilStdinCloses = False,
) -> None:
    """Run a peer through which others join; prints its addresses.

    Without --join it is the first peer of a new swarm.
    """
    if until_stdin_closes:
        stop_when_stdin_closes()
    asyncio.run(run_bootstrap(config, ready_file))


async def run_bootstrap(config: NodeConfig, ready_file: Path | None = None) -> None:
    """Run a member until SIGINT or SIGTERM. Prints one address per line on stdout.

    Raises BootstrapFailed if there are initial peers and none answers.
    """
    with collector_at_rest():
        from petals.swarm.node import SwarmNode

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    with listed_as_running() as publish:
        async with SwarmNode(config) as node:
            await node.become_reachable()
            addresses = await node.addresses()
            say("The swarm can be joined at:")
            for address in addresses:
                print_data(address)
            facts: dict[str, object] = {"peer_id": node.peer_id, "initial_peers": list(addresses)}
            publish(facts)
            write_ready_file(ready_file, facts)
            await stopped.wait()
            say("Draining")
