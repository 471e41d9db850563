"""`petals ps`: the servers and bootstrap peers that this user runs on this machine.

Reads the list of processes and what servers have written about themselves. Must not use the
network.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from petals.cli.terminal import options
from petals.cli.terminal.console import print_json, print_table, say
from petals.cli.terminal.lifetime import running_dir
from petals.cli.terminal.wording import duration, size

SERVING = ("serve", "run_server")
_LASTING = (*SERVING, "bootstrap", "run_dht", "swarm", "demo")
_MODULES = {"petals.cli.run_server": "run_server", "petals.cli.run_dht": "run_dht"}
_SCRIPTS = {"run_server.py": "run_server", "run_dht.py": "run_dht"}
_ENTRIES = ("petals", "petals.cli", "petals.cli.main")


def ps(as_json: options.Json = False) -> None:
    """List the servers that you run on this machine.

    A server that is still starting has no blocks yet.
    """
    found = find_running()
    if as_json:
        print_json({"processes": [asdict(each) for each in found]})
        return
    if not found:
        say("You run no servers on this machine. Start one: petals serve MODEL")
        return
    print_table(
        ("PID", "COMMAND", "MODEL", "BLOCKS", "MEMORY", "UP", "PEER"),
        [
            (
                str(each.pid),
                each.command,
                each.model or "-",
                "-" if each.blocks is None else "{}:{}".format(*each.blocks),
                size(each.memory_bytes),
                duration(each.seconds),
                f"…{each.peer_id[-6:]}" if each.peer_id else "-",
            )
            for each in found
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningProcess:
    """A process of Petals; ``blocks`` and ``peer_id`` once it is online."""

    pid: int
    command: str
    model: str
    blocks: tuple[int, int] | None
    peer_id: str
    memory_bytes: int
    seconds: float


def find_running() -> list[RunningProcess]:
    """What this user runs, by pid, without the process that asks."""
    found = []
    for process in psutil.process_iter():
        try:
            command = petals_command(process.cmdline())
            if command is None or process.pid == os.getpid() or not _is_own(process):
                continue
            name, model = command
            began = process.create_time()
            known = _read(running_dir() / f"{process.pid}.json", began)
            memory = process.memory_info().rss
        except psutil.Error:  # it has ended, or belongs to someone else
            continue
        blocks = known.get("blocks")
        found.append(
            RunningProcess(
                pid=process.pid,
                command=name,
                model=str(known.get("model", model)),
                blocks=(blocks[0], blocks[1]) if isinstance(blocks, list) else None,
                peer_id=str(known.get("peer_id", "")),
                memory_bytes=memory,
                seconds=time.time() - began,
            )
        )
    return sorted(found, key=lambda each: each.pid)


def petals_command(words: Sequence[str]) -> tuple[str, str] | None:
    """(command, model) of a command line that runs a lasting command of Petals; None for others."""
    if "python" in Path(words[0] if words else "").name:
        words = words[1:]
    words = list(words)
    while words and words[0].startswith("-") and words[0] != "-c":  # options of the interpreter
        words = words[2:] if words[0] in ("-X", "-W") else words[1:]
    if not words:
        return None
    entry, rest = words[0], words[1:]
    name = _MODULES.get(entry) or _SCRIPTS.get(Path(entry).name)
    is_petals = entry in _ENTRIES or Path(entry).name == "petals"
    is_petals = is_petals or Path(entry).match("petals/cli/__main__.py")
    if name is None and is_petals and rest:
        name, rest = rest[0], rest[1:]
        if name == "swarm":
            name, rest = ("swarm", rest[1:]) if rest[:1] == ["up"] else ("", [])
    if name not in _LASTING:
        return None
    has_model = name in (*SERVING, "swarm") and rest and not rest[0].startswith("-")
    return name, Path(rest[0]).name if has_model else ""


def _is_own(process: psutil.Process) -> bool:
    return process.uids().real == os.getuid() and process.status() != psutil.STATUS_ZOMBIE


def _read(file: Path, began: float) -> dict[str, Any]:
    """What the process has written about itself; empty if another one of its pid has."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        is_older = file.stat().st_mtime < began
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and not is_older else {}
