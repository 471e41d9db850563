"""Running a server in the foreground: its messages while it starts, its ready file, its log.

For `serve` and `run_server`. Must not know how the server works.
"""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from petals.cli.terminal.console import print_data, say, talk
from petals.cli.terminal.lifetime import write_ready_file
from petals.imports import collector_at_rest

if TYPE_CHECKING:
    from petals.server.config import ServerConfig
    from petals.server.server import OnlineInfo


class _LoadingBar:
    """Bytes of weights read so far; drawn on a terminal only, called from the loading thread."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        console = talk()
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task: TaskID | None = None

    def update(self, done: int, total: int) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("Loading weights", total=total)
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        self._progress.stop()


def run_server(config: "ServerConfig", ready_file: Path | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Prints the server's addresses on stdout when it is online.

    Raises what `Server.run` raises.
    """
    from petals.logs import configure_logging

    with collector_at_rest():
        from petals.server.server import Server, Watchers, run_until_signalled
    gc.freeze()  # imported objects stay: the collector need not scan them while a step waits

    configure_logging()
    bar = _LoadingBar()

    def report(info: "OnlineInfo") -> None:
        say(
            f"{info.model}: {info.dtype}, {info.quant} quantization, sessions up to "
            f"{info.max_length} tokens, cache for {info.cache_tokens}"
        )
        for address in info.addresses:
            print_data(address)
        write_ready_file(
            ready_file,
            {
                "peer_id": info.peer_id,
                "model": info.model,
                "blocks": [info.blocks.start, info.blocks.end],
                "addresses": list(info.addresses),
            },
        )

    watchers = Watchers(on_stage=say, on_loading=bar.update, on_online=report)
    try:
        run_until_signalled(lambda: Server(config, watchers))
    finally:
        bar.close()
