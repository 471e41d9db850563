"""`petals drain`: have a server on this machine hand its sessions over and leave.

Finds the process and sends it a signal, which only its owner may. Must not use the network.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from petals.cli.commands.ps import SERVING, petals_command
from petals.cli.terminal.console import say, stage
from petals.errors import ConfigError

_POLL_SECONDS = 0.1
"""Pause between two looks at whether the process has ended."""

_REPORT_SECONDS = 5.0
"""Period of the line that says how long it has taken."""

_BETWEEN_SIGNALS_SECONDS = 0.5
"""Pause before the second signal of --now."""


def drain(
    server: Annotated[
        str,
        typer.Argument(metavar="PID|FILE", help="The server's process id, or its --ready-file."),
    ],
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for sessions: clients repair themselves.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Return when the server has left.")
    ] = True,
) -> None:
    """Have a server on this machine hand its sessions over.

    They continue on other servers; then the server leaves the swarm.
    """
    process = find_server(server)
    process.terminate()
    # Two signals that arrive together may count as one.
    if now and not _has_left(process, _BETWEEN_SIGNALS_SECONDS):
        process.terminate()
    if not wait:
        say(f"Server {process.pid} has been asked to leave.")
        return
    with stage(f"Server {process.pid} hands its sessions over") as activity:
        began = time.monotonic()
        while not _has_left(process, _REPORT_SECONDS):
            seconds = time.monotonic() - began
            activity.change(f"Server {process.pid} hands its sessions over ({seconds:.0f} s)")
    say(f"Server {process.pid} has left.")


def find_server(server: str) -> psutil.Process:
    """The process of a pid or of a ready file. Raises ConfigError if it is no server."""
    file = None if server.isdigit() else Path(server)
    pid = int(server) if file is None else _pid_in(file)
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        is_another = file is not None and process.create_time() > file.stat().st_mtime
    except psutil.AccessDenied:
        raise ConfigError(
            f"Process {pid} belongs to another user.", hint="Run this as the server's own user."
        ) from None
    except psutil.NoSuchProcess:
        raise _not_running(server, pid) from None
    if is_another:  # the server has ended, and another process has its pid
        raise _not_running(server, pid)
    name, _ = petals_command(command) or ("", "")
    if name not in SERVING:
        raise ConfigError(
            f"Process {pid} is no Petals server.",
            hint="petals ps lists the servers on this machine.",
        )
    return process


def _has_left(process: psutil.Process, seconds: float) -> bool:
    """Whether the process ends within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            # A zombie has ended; only its parent has not noticed yet.
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)


def _pid_in(file: Path) -> int:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["pid"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no ready file of a server: {error}",
            hint="Give a process id, or the file of petals serve --ready-file FILE.",
        ) from error


def _not_running(server: str, pid: int) -> ConfigError:
    return ConfigError(
        f"No server runs as process {pid}.", hint=f"It has left already, if {server} was right."
    )
