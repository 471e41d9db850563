"""`petals serve`: hold some blocks of a model and run them for clients.

Its options are the fields of ServerConfig. Must not know how the server works.
"""

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.lifetime import stop_when_stdin_closes
from petals.cli.terminal.serving import run_server
from petals.server.config import ServerConfig

AGENT = "petals-server"


@options.with_config(
    ServerConfig,
    fixed={"network.agent": AGENT, "network.peer_memory": constants.peers_dir},
)
def serve(
    config: ServerConfig,
    ready_file: options.ReadyFile = None,
    until_stdin_closes: options.UntilStdinCloses = False,
) -> None:
    """Serve blocks of a model.

    With --join as a member of that swarm, without it as the first peer of a new one.
    """
    if until_stdin_closes:
        stop_when_stdin_closes()
    run_server(config, ready_file)
