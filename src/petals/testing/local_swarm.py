"""A whole swarm on this machine: a bootstrap peer and some servers, each a real process.

Starts `petals bootstrap` and `petals serve`, waits until all are online, lists them, and stops them
with every process that they started. Used by `petals demo`, `petals swarm up` and the end-to-end
tests. Must not know models, tensors or messages: it sees command lines, ready files and logs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from petals.errors import ConfigError, SwarmError
from petals.logs import plural
from petals.types import BlockSpan, PeerId

COMMAND = (sys.executable, "-m", "petals.cli")
"""The start of every child's command line."""

_POLL_SECONDS = 0.05
"""Pause between two looks at a process that starts or ends."""

_POLITE_SECONDS = 1.0
"""Time for servers to drain before they are told to leave without draining."""

_LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSwarmConfig:
    """What to start. ``spans`` has one entry per server; they may overlap.

    ``num_threads`` bounds the CPU threads of each server; None lets every server choose.
    ``server_options`` and ``bootstrap_options`` are added to the command lines.
    """

    model: str
    spans: tuple[BlockSpan, ...] = ()
    dtype: str = "auto"
    swarm_key: Path | None = None
    num_threads: int | None = None
    server_options: tuple[str, ...] = ()
    bootstrap_options: tuple[str, ...] = ()
    startup_timeout_seconds: float = 180.0
    stop_timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class LocalProcess:
    """A child process, the leader of a process group of its own, with its ready file and log."""

    name: str
    popen: subprocess.Popen[bytes]
    ready: Path
    log: Path

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def info(self) -> dict[str, Any]:
        """The content of the ready file."""
        content: dict[str, Any] = json.loads(self.ready.read_text(encoding="utf-8"))
        return content

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def signal(self, signum: int, *, alone: bool = False) -> None:
        """Send a signal to the process group and to the network daemons, each in a session of its
        own, or to the process ``alone``.
        """
        daemons = [] if alone else self._children()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.kill if alone else os.killpg)(self.popen.pid, signum)
        for daemon in daemons:
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon.send_signal(signum)

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.popen.pid).children()
        except psutil.NoSuchProcess:
            return []

    def end(self, seconds: float) -> None:
        """SIGTERM, after ``seconds`` SIGKILL. No process of the group is left afterwards."""
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(max(0.0, seconds))
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group; returns when the process has ended."""
        self.signal(signal.SIGKILL)
        self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server process, the blocks that it serves and the addresses that it can be dialled at."""

    process: LocalProcess
    peer_id: PeerId
    blocks: BlockSpan
    addresses: tuple[str, ...]

    @property
    def pid(self) -> int:
        return self.process.popen.pid

    @property
    def log(self) -> Path:
        return self.process.log


class LocalSwarm:
    """Context manager: inside, the swarm is online; afterwards no process of it is left.

    ``say`` gets a sentence at every stage of the start. ``servers`` are those that were started
    and neither killed nor ended by a method of this class.
    """

    def __init__(
        self, config: LocalSwarmConfig, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config = config
        self.servers: list[LocalServer] = []
        self.initial_peers: tuple[str, ...] = ()
        self._say = say
        self._bootstrap: LocalProcess | None = None
        self._children: list[LocalProcess] = []
        self._folder: Path | None = None
        self._num_started = 0

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

        ``choose_spans``, if given, is called for the spans while the bootstrap peer starts. Raises
        SwarmError with the end of the log of the process that did not come online.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="petals-swarm-"))
            self._say("Starting the bootstrap peer")
            self._bootstrap = self._start_bootstrap()
            spans = self.config.spans if choose_spans is None else choose_spans()
            self._await_ready(self._bootstrap, self._deadline())
            self.initial_peers = tuple(self._bootstrap.info()["initial_peers"])
            if not spans:
                raise ConfigError(
                    "A swarm needs at least one server.", hint="Say --servers 1 or more."
                )
            self._say(f"Starting {plural(len(spans), 'server')}")
            for number, _ in enumerate(self._start_servers(spans), start=1):
                self._say(f"{number} of {plural(len(spans), 'server')} online")
        except BaseException:
            self.stop()
            raise

    def add_servers(self, *spans: BlockSpan) -> list[LocalServer]:
        """Start more servers, all at the same time; return when all of them are online."""
        return list(self._start_servers(spans))

    def restart_bootstrap(self) -> None:
        """Start the bootstrap peer again, if it has died.

        It is found again only with ``bootstrap_options`` that fix its port and identity.
        """
        if self._bootstrap is not None and not self._bootstrap.is_running:
            self._bootstrap = self._start_bootstrap()
            self._await_ready(self._bootstrap, self._deadline())

    def kill(self, server: LocalServer) -> None:
        """SIGKILL to a server and to every process that it started."""
        self.servers.remove(server)
        self._children.remove(server.process)
        server.process.kill()

    def kill_bootstrap(self) -> None:
        """SIGKILL to the bootstrap peer."""
        assert self._bootstrap is not None
        self._children.remove(self._bootstrap)
        self._bootstrap.kill()

    def end(self, server: LocalServer) -> None:
        """Ask a server to leave and wait for its end, at most ``stop_timeout_seconds``."""
        self.servers.remove(server)
        self._children.remove(server.process)
        server.process.end(self.config.stop_timeout_seconds)

    def server(self, peer: PeerId) -> LocalServer:
        """The server with this peer id."""
        return next(server for server in self.servers if server.peer_id == peer)

    @property
    def processes(self) -> tuple[LocalProcess, ...]:
        """All that were started and not ended by a method of this class, in their order."""
        return tuple(self._children)

    def exited(self) -> set[str]:
        """Names of processes that ended although no method of this class ended them."""
        return {child.name for child in self._children if not child.is_running}

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
        """End every process: ask first, then kill. Safe to call twice. Logs are removed."""
        children, self._children = self._children, []
        # The bootstrap peer last: the others say goodbye through it.
        self._end([child for child in children if child is not self._bootstrap])
        self._end([child for child in children if child is self._bootstrap])
        self.servers.clear()
        folder, self._folder = self._folder, None
        if folder is not None:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    def command(self, name: str, arguments: list[str]) -> list[str]:
        """The command line of the process ``name``; a subclass may have it run elsewhere."""
        return [*COMMAND, *arguments, "--host", "127.0.0.1"]

    def _end(self, children: list[LocalProcess]) -> None:
        for child in children:
            child.popen.terminate()
        deadline = time.monotonic() + self.config.stop_timeout_seconds
        polite_until = time.monotonic() + _POLITE_SECONDS
        while any(child.is_running for child in children) and time.monotonic() < polite_until:
            time.sleep(_POLL_SECONDS)
        for child in children:
            # A server that is asked twice does not wait for sessions, which no replica could take.
            child.end(deadline - time.monotonic())

    def _deadline(self) -> float:
        return time.monotonic() + self.config.startup_timeout_seconds

    def _start_servers(self, spans: Iterable[BlockSpan]) -> Iterable[LocalServer]:
        """Start all of them now; yield each when it is online."""
        deadline = self._deadline()
        children = [self._start("server", self._serve_arguments(span)) for span in spans]
        for child in children:
            self._await_ready(child, deadline)
            info = child.info()
            server = LocalServer(
                process=child,
                peer_id=PeerId(info["peer_id"]),
                blocks=BlockSpan(*info["blocks"]),
                addresses=tuple(info.get("addresses", ())),
            )
            self.servers.append(server)
            yield server

    def _serve_arguments(self, span: BlockSpan) -> list[str]:
        arguments = ["serve", self.config.model, "--blocks", str(span)]
        arguments += ["--dtype", self.config.dtype]
        if self.config.num_threads is not None:
            arguments += ["--threads", str(self.config.num_threads)]
        for address in self.initial_peers:
            arguments += ["--join", address]
        return [*arguments, *self.config.server_options]

    def _start_bootstrap(self) -> LocalProcess:
        return self._start("bootstrap", ["bootstrap", *self.config.bootstrap_options])

    def _start(self, role: str, arguments: list[str]) -> LocalProcess:
        if self._folder is None:
            raise SwarmError("This swarm was stopped.", hint="Start a new LocalSwarm.")
        name = f"{role}-{self._num_started}" if self._num_started else role
        self._num_started += 1
        ready, log = self._folder / f"{name}.json", self._folder / f"{name}.log"
        options = ["--ready-file", str(ready), "--until-stdin-closes"]
        if self.config.swarm_key is not None:
            options += ["--swarm-key", str(self.config.swarm_key)]
        with log.open("wb") as output:
            popen = subprocess.Popen(
                self.command(name, [*arguments, *options]),
                # The pipe is how a child learns that we are gone, however we went.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = LocalProcess(name, popen, ready, log)
        self._children.append(child)
        return child

    def _await_ready(self, child: LocalProcess, deadline: float) -> None:
        while not child.ready.exists():
            if not child.is_running:
                raise SwarmError(
                    f"{child.name} ended with status {child.popen.returncode} before it was "
                    f"online.\n{child.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"{child.name} was not online after "
                    f"{self.config.startup_timeout_seconds:.0f} s.\n{child.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)
