"""The swarm that is tormented: real processes, ended in all ways and made whole again.

A LocalSwarm whose bootstrap peer keeps its address when it is started again and whose servers can
each live on a host of a network laboratory. Knows processes; knows no tensors.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import psutil

from nemesis.netlab import NetLab
from petals.testing.local_swarm import COMMAND, LocalServer, LocalSwarm, LocalSwarmConfig, _Child
from petals.types import BlockSpan, PeerId

DAEMON = "p2pd"
CLIENT_HOST, BOOTSTRAP_HOST = "client", "boot"
NUM_LAB_HOSTS = 9


class Arena(LocalSwarm):
    """Context manager, like LocalSwarm. ``spans`` has one entry for each server there shall be."""

    def __init__(
        self,
        config: LocalSwarmConfig,
        spans: tuple[BlockSpan, ...],
        lab: NetLab | None = None,
    ) -> None:
        super().__init__(config)
        self.spans = spans
        self.lab = lab
        self.hosts: dict[PeerId, str] = {}
        self._leaving: list[LocalServer] = []
        self._names = count(1)
        self._ports: dict[str, int] = {}
        self._started_hosts: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
        self._bootstrap: Any = None
        self._addresses: dict[PeerId, tuple[str, ...]] = {}

    # -- life ----------------------------------------------------------------------------------

    def start(self, choose_spans: Any = None) -> None:
        self.config = replace(self.config, spans=self.spans)
        super().start(choose_spans)
        self._bootstrap = self._children[0]
        for server, child in zip(self.servers, self._children[1:]):
            self._note(server, child)

    def stop(self) -> None:
        for server in list(self.servers):
            self.signal(server, signal.SIGCONT)
        super().stop()

    def grow(self, spans: list[BlockSpan]) -> list[LocalServer]:
        """Start servers, all at the same time; returns when they are online."""
        deadline = self._deadline()
        children = [
            self._start(f"more-{next(self._names)}", self._serve_arguments(span)) for span in spans
        ]
        servers = [self._await_server(child, deadline) for child in children]
        for server, child in zip(servers, children):
            self._note(server, child)
        self.servers.extend(servers)
        return servers

    def restore(self) -> None:
        """Start what has died and end what is too many."""
        if self._bootstrap.process.poll() is not None:
            self._bootstrap = self._start(f"bootstrap-{next(self._names)}", ["bootstrap"])
            self._await_ready(self._bootstrap, self._deadline())
        while self._leaving:
            self.end(self._leaving.pop())
        self._forget_dead()
        missing = []
        for span, num_holders in Counter(self.spans).items():
            holders = [server for server in self.servers if server.blocks == span]
            missing += [span] * (num_holders - len(holders))
            for server in holders[num_holders:]:
                self.end(server)
        self._forget_dead()
        if missing:
            self.grow(missing)

    def end(self, server: LocalServer) -> None:
        """Ask a server to leave and wait for its end."""
        (child,) = [child for child in self._children if child.process.pid == server.pid]
        child.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(self.config.stop_timeout_seconds)
        if child.process.poll() is None:
            self.signal(server, signal.SIGKILL)
            child.process.wait()

    def alive(self) -> list[LocalServer]:
        """Servers whose process has not ended."""
        running = {child.process.pid for child in self._children if child.process.poll() is None}
        return [server for server in self.servers if server.pid in running]

    @property
    def meeting_points(self) -> tuple[str, ...]:
        """Addresses to join at: the bootstrap peer's, and of some servers should it be dead."""
        some = [address for s in self.alive()[:2] for address in self._addresses[s.peer_id][:1]]
        return (*self.initial_peers, *some)

    # -- harm ----------------------------------------------------------------------------------

    def signal(self, server: LocalServer, signum: int, *, alone: bool = False) -> None:
        """To a server with its network daemon, or to its own process ``alone``."""
        with contextlib.suppress(ProcessLookupError):
            if alone:
                os.kill(server.pid, signum)
            else:
                os.killpg(server.pid, signum)

    def ask_to_leave(self, server: LocalServer) -> None:
        """SIGTERM; ``restore`` waits for its end."""
        self._leaving.append(server)
        self.signal(server, signal.SIGTERM, alone=True)

    def kill_daemon(self, pid: int) -> None:
        """End the network daemon that the process ``pid`` has started, and nothing else."""
        for daemon in daemons(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon.kill()

    def kill_bootstrap(self) -> None:
        os.killpg(self._bootstrap.process.pid, signal.SIGKILL)
        self._bootstrap.process.wait()

    def of(self, peer: PeerId) -> LocalServer:
        """The server of a peer id."""
        return next(server for server in self.servers if server.peer_id == peer)

    # -- inside --------------------------------------------------------------------------------

    def _note(self, server: LocalServer, child: _Child) -> None:
        told = self._await_ready(child, self._deadline())
        self._addresses[server.peer_id] = tuple(told.get("addresses", ()))
        if child.name in self._started_hosts:
            self.hosts[server.peer_id] = self._started_hosts[child.name][0]

    def _forget_dead(self) -> None:
        alive = self.alive()
        for server in self.servers:
            if server not in alive:
                # Whatever is left of its group, too: a daemon outlives its parent for a moment.
                self.signal(server, signal.SIGKILL)
        self.servers[:] = alive

    def _start(self, name: str, arguments: list[str]) -> _Child:
        """As LocalSwarm does; besides, on a host of the laboratory, at a port that stays."""
        command = [*COMMAND, *arguments]
        if arguments[0] == "bootstrap":
            port = self._ports.setdefault("bootstrap", _free_port())
            assert self._folder is not None
            command += ["--identity", str(self._folder / "bootstrap.key"), "--port", str(port)]
        return self._spawn(name, command)

    def _spawn(self, name: str, command: list[str]) -> _Child:
        assert self._folder is not None
        ready, log = self._folder / f"{name}.json", self._folder / f"{name}.log"
        ip, wrap = "127.0.0.1", list
        if self.lab is not None:
            host = BOOTSTRAP_HOST if name.startswith("bootstrap") else self._free_host()
            ip, lab = self.lab.ip(host), self.lab

            def wrap(words: list[str]) -> list[str]:
                return lab.command(host, words)

        command += ["--host", ip, "--ready-file", str(ready), "--until-stdin-closes"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                wrap(command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self.lab is not None:
            self._started_hosts[name] = (host, process)
        child = _Child(name, process, ready, log)
        self._children.append(child)
        return child

    def _free_host(self) -> str:
        taken = {host for host, process in self._started_hosts.values() if process.poll() is None}
        hosts = [f"s{number}" for number in range(1, NUM_LAB_HOSTS + 1)]
        return next(host for host in hosts if host not in taken)


def daemons(pid: int) -> list[psutil.Process]:
    """Network daemons that a process has started; not those of the servers it has started."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if child.name() == DAEMON]
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Any, seconds: float, pause: float = 0.05) -> bool:
    """Whether ``condition()`` came true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
