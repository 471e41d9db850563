"""A whole swarm on this machine: a bootstrap peer and some servers, each a real process.

Starts `petals bootstrap` and `petals serve`, waits until all are online, names them, and stops them
with everything they started. Used by `petals demo`, `petals swarm up` and the end-to-end tests.
Must not know models, tensors or messages: it sees only command lines, ready files and logs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from petals.errors import ConfigError, SwarmError
from petals.types import BlockSpan, PeerId

COMMAND = (sys.executable, "-m", "petals.cli")
"""What a child runs, before the arguments."""

_POLL_SECONDS = 0.05
_POLITE_SECONDS = 1.0
_LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSwarmConfig:
    """What to start. `spans` has one entry per server; they may overlap.

    `num_threads` bounds the CPU threads of each server; None lets every server choose.
    """

    model: str
    spans: tuple[BlockSpan, ...] = ()
    dtype: str = "auto"
    swarm_key: Path | None = None
    num_threads: int | None = None
    server_options: tuple[str, ...] = ()
    startup_timeout_seconds: float = 180.0
    stop_timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class LocalServer:
    """One running server process: who it is and what it serves."""

    pid: int
    peer_id: PeerId
    blocks: BlockSpan
    log: Path


@dataclass(slots=True)
class _Child:
    """A process of ours with its ready file and log."""

    name: str
    process: subprocess.Popen[bytes]
    ready: Path
    log: Path


@dataclass(slots=True)
class LocalSwarm:
    """Context manager: inside, the swarm is online; afterwards no process of it is left."""

    config: LocalSwarmConfig
    say: Callable[[str], None] = lambda text: None
    servers: list[LocalServer] = field(default_factory=list)
    initial_peers: tuple[str, ...] = ()
    _children: list[_Child] = field(default_factory=list)
    _folder: Path | None = None

    def __enter__(self) -> Self:
        if not self._children:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, choose_spans: Callable[[], tuple[BlockSpan, ...]] | None = None) -> None:
        """Return when every server is online; leave nothing behind if that fails.

        `choose_spans`, if given, is asked for the spans while the bootstrap peer comes up. Raises
        SwarmError with the end of the log of the process that did not come up.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="petals-swarm-"))
            self.say("Starting the bootstrap peer")
            seed = self._start("bootstrap", ["bootstrap"])
            spans = self.config.spans if choose_spans is None else choose_spans()
            self.initial_peers = tuple(self._await_ready(seed, self._deadline())["initial_peers"])
            self._start_servers(spans)
        except BaseException:
            self.stop()
            raise

    def _start_servers(self, spans: tuple[BlockSpan, ...]) -> None:
        if not spans:
            raise ConfigError("A swarm needs at least one server.", hint="Say --servers 1 or more.")
        self.say(f"Starting {len(spans)} servers")
        deadline = self._deadline()
        children = [
            self._start(f"server-{number}", self._serve_arguments(span))
            for number, span in enumerate(spans, start=1)
        ]
        for child in children:
            self.servers.append(self._await_server(child, deadline))
            self.say(f"{len(self.servers)} of {len(spans)} servers are online")

    def add_server(self, span: BlockSpan) -> LocalServer:
        """Start one more server and return when it is online."""
        child = self._start(f"server-{len(self._children)}", self._serve_arguments(span))
        server = self._await_server(child, self._deadline())
        self.servers.append(server)
        return server

    def kill(self, server: LocalServer, signum: int = signal.SIGKILL) -> None:
        """Send a signal to a server and all its children; SIGKILL by default."""
        os.killpg(server.pid, signum)

    def exited(self) -> set[str]:
        """Names of processes that ended although nobody called `stop`."""
        return {child.name for child in self._children if child.process.poll() is not None}

    def state(self) -> dict[str, object]:
        """What `--state-file` holds: join addresses, and pid, peer id and blocks of each server."""
        return {
            "model": self.config.model,
            "initial_peers": list(self.initial_peers),
            "servers": [
                {
                    "pid": server.pid,
                    "peer_id": server.peer_id,
                    "blocks": [server.blocks.start, server.blocks.end],
                    "log": str(server.log),
                }
                for server in self.servers
            ],
        }

    def stop(self) -> None:
        """End every process: ask first, then insist. Safe to call twice. Logs are removed."""
        children, self._children = self._children, []
        # The bootstrap peer last: the others say goodbye through it.
        for group in (children[1:], children[:1]):
            self._end(group)
        self.servers.clear()
        self._remove_logs()

    def _end(self, children: list[_Child]) -> None:
        for child in children:
            # Only to the process: its network daemon must live until it has said goodbye.
            child.process.terminate()
        deadline = time.monotonic() + self.config.stop_timeout_seconds
        _await_all(children, _POLITE_SECONDS)
        for child in children:
            # Asked twice, a server does not wait for sessions that nobody here could take over.
            child.process.terminate()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            # Also after a clean exit: what a process started must not outlive it.
            _signal_group(child.process, signal.SIGKILL)
            child.process.wait()
            if child.process.stdin is not None:
                child.process.stdin.close()

    def _remove_logs(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    def _deadline(self) -> float:
        return time.monotonic() + self.config.startup_timeout_seconds

    def _serve_arguments(self, span: BlockSpan) -> list[str]:
        arguments = ["serve", self.config.model, "--blocks", str(span)]
        arguments += ["--dtype", self.config.dtype]
        if self.config.num_threads is not None:
            arguments += ["--threads", str(self.config.num_threads)]
        for address in self.initial_peers:
            arguments += ["--join", address]
        return [*arguments, *self.config.server_options]

    def _start(self, name: str, arguments: list[str]) -> _Child:
        if self._folder is None:
            raise SwarmError("This swarm was stopped.", hint="Start a new LocalSwarm.")
        ready, log = self._folder / f"{name}.json", self._folder / f"{name}.log"
        options = ["--host", "127.0.0.1", "--ready-file", str(ready), "--until-stdin-closes"]
        if self.config.swarm_key is not None:
            options += ["--swarm-key", str(self.config.swarm_key)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, *arguments, *options],
                # The pipe is how a child learns that we are gone, however we went.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = _Child(name, process, ready, log)
        self._children.append(child)
        return child

    def _await_server(self, child: _Child, deadline: float) -> LocalServer:
        told = self._await_ready(child, deadline)
        return LocalServer(
            pid=child.process.pid,
            peer_id=PeerId(told["peer_id"]),
            blocks=BlockSpan(*told["blocks"]),
            log=child.log,
        )

    def _await_ready(self, child: _Child, deadline: float) -> dict[str, Any]:
        while not child.ready.exists():
            if child.process.poll() is not None:
                raise SwarmError(
                    f"{child.name} ended with status {child.process.returncode} before it was "
                    f"online.\n{_tail(child.log)}"
                )
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"{child.name} was not online after "
                    f"{self.config.startup_timeout_seconds:.0f} s.\n{_tail(child.log)}"
                )
            time.sleep(_POLL_SECONDS)
        told: dict[str, Any] = json.loads(child.ready.read_text(encoding="utf-8"))
        return told


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except (ProcessLookupError, PermissionError):
        return


def _await_all(children: list[_Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(child.process.poll() is None for child in children):
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])
