"""Running a server in the foreground: its messages while it starts, its ready file, its log.

For `serve` and `run_server`. Must not know how the server works.
"""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from petals.cli.terminal.console import print_data, say, stage
from petals.cli.terminal.lifetime import Interrupts, listed_as_running, write_ready_file
from petals.imports import collector_at_rest

if TYPE_CHECKING:
    from petals.server.config import ServerConfig
    from petals.server.server import OnlineInfo


def run_server(config: "ServerConfig", ready_file: Path | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Prints the server's addresses on stdout when it is online.

    Raises what `Server.run` raises.
    """
    from petals.logs import configure_logging

    _check_blocks(config)
    starting = stage(f"Starting a server for {config.source.model}", keeps_lines=True)
    with listed_as_running() as publish, starting as activity:
        interrupts = Interrupts()
        with interrupts.counted(), collector_at_rest():
            from petals.server.server import Server, Watchers, run_until_signalled
        if interrupts.pressed:  # an import of a library has swallowed it
            raise KeyboardInterrupt
        gc.freeze()  # imported objects stay: the collector need not scan them while a step waits
        configure_logging()

        def report(info: "OnlineInfo") -> None:
            activity.close()
            facts = _report(info)
            publish(facts)
            write_ready_file(ready_file, facts)

        watchers = Watchers(
            on_stage=activity.change,
            on_loading=activity.measure,
            on_online=report,
        )
        run_until_signalled(lambda: Server(config, watchers))


def _report(info: "OnlineInfo") -> dict[str, object]:
    """Print the facts about a server that has come online; return those for its ready file."""
    say(
        f"{info.model}: {info.dtype}, {info.quant} quantization, sessions up to "
        f"{info.max_length} tokens, cache for {info.cache_tokens}"
    )
    for address in info.addresses:
        print_data(address)
    return {
        "peer_id": info.peer_id,
        "model": info.model,
        "blocks": [info.blocks.start, info.blocks.end],
        "addresses": list(info.addresses),
    }


def _check_blocks(config: "ServerConfig") -> None:
    """Refuse blocks that the model does not have, before the imports, which take seconds."""
    from petals.models.checkpoint.glance import check_blocks, glance_at_blocks

    source = config.source
    if config.blocks is not None:
        num_blocks = glance_at_blocks(source.model, source.revision, source.cache_dir)
        if num_blocks is not None:
            check_blocks(source.model, config.blocks, num_blocks)
