"""Network namespaces, the processes in them, and the laboratories that are registered here.

A laboratory is a folder in `STATE_ROOT` with a ``state.json``; its namespaces carry its name.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STATE_ROOT = Path(os.environ.get("NETLAB_STATE", "/run/netlab"))
PREFIX = "nlab-"
_NAMESPACES = Path("/run/netns")
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_END_SECONDS = 1.0
"""Time for the forwarder to end by itself before it is killed."""

Identity = tuple[int, int]
"""Process id and the kernel's start time: process ids are used again."""


class NetLabError(RuntimeError):
    """A laboratory cannot be made, found or changed."""


def missing() -> str:
    """What this machine lacks for a laboratory, as a sentence; empty if nothing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return "A laboratory needs Linux."
    lines = status.read_text(encoding="ascii").splitlines()
    (granted,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
    if not all(granted >> bit & 1 for bit in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN)):
        return "A laboratory needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)."
    if not os.path.exists("/dev/net/tun"):
        return "A laboratory needs /dev/net/tun: modprobe tun"
    for program in ("ip", "cc"):
        if shutil.which(program) is None:
            return f"A laboratory needs the program {program}."
    return ""


def call(words: Sequence[str], **options: Any) -> str:
    """Run a program and return what it prints. Raises NetLabError if it fails."""
    ended = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if ended.returncode:
        raise NetLabError(f"{' '.join(words)}: {ended.stdout.strip()}")
    return ended.stdout


def identity(pid: int) -> Identity | None:
    """The identity of a process, None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *rest = stat.rsplit(")", 1)[1].split()
    return None if state in "ZX" else (pid, int(rest[18]))


def is_alive(process: Sequence[int] | None) -> bool:
    """Whether the process with this identity still runs."""
    return process is not None and identity(process[0]) == tuple(process)


def allow_congestion_control(name: str) -> None:
    """Let namespaces choose a congestion control that is not on the machine's list of allowed ones.

    The only setting outside its namespaces that a laboratory changes. Raises NetLabError.
    """
    folder = Path("/proc/sys/net/ipv4")
    allowed = (folder / "tcp_allowed_congestion_control").read_text().split()
    if name in allowed:
        return
    if name not in (folder / "tcp_available_congestion_control").read_text().split():
        raise NetLabError(f"This kernel has no congestion control {name}.")
    (folder / "tcp_allowed_congestion_control").write_text(" ".join([*allowed, name]))


def namespace(lab: str, host: str) -> str:
    """The name of a host's network namespace."""
    return f"{PREFIX}{lab}-{host}"


def remove_namespace(name: str) -> None:
    """Kill every process of a namespace and remove it."""
    while pids := _pids(name):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def _pids(name: str) -> list[int]:
    listed = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    return [pid for pid in map(int, listed.stdout.split()) if pid != os.getpid()]


@contextlib.contextmanager
def registry() -> Iterator[None]:
    """Inside, no other process makes or removes laboratories."""
    STATE_ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(STATE_ROOT / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def labs() -> dict[str, dict[str, Any]]:
    """The states of all registered laboratories; an empty state where none can be read."""
    found: dict[str, dict[str, Any]] = {}
    for folder in STATE_ROOT.iterdir() if STATE_ROOT.is_dir() else ():
        if folder.is_dir():
            found[folder.name] = {}
            with contextlib.suppress(OSError, ValueError):
                found[folder.name] = json.loads((folder / "state.json").read_text())
    return found


def is_running(state: dict[str, Any]) -> bool:
    """Whether the process that made a laboratory lives; the laboratory ends with it."""
    return is_alive(state.get("owner"))


def remove(lab: str, forwarder: Sequence[int] | None) -> None:
    """Remove a laboratory's namespaces with their processes, its forwarder and its folder."""
    names = [path.name for path in _NAMESPACES.iterdir()] if _NAMESPACES.is_dir() else []
    for name in names:
        if name.startswith(namespace(lab, "")):
            remove_namespace(name)
    if forwarder is not None and is_alive(forwarder):
        os.kill(forwarder[0], signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while is_alive(forwarder) and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(forwarder[0], signal.SIGKILL)
    shutil.rmtree(STATE_ROOT / lab, ignore_errors=True)


def remove_dead() -> list[str]:
    """Remove what crashed runs left behind; returns the names. Call it inside `registry`."""
    dead = [name for name, state in labs().items() if not is_running(state)]
    for name in dead:
        remove(name, labs()[name].get("forwarder"))
    return dead
