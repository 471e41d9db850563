"""The swarm under test: real processes that are killed in every way and replaced between scenarios.

A LocalSwarm whose bootstrap peer keeps its address when it is restarted and whose servers can each
run on a host of a network laboratory. Knows processes; knows no tensors.
"""

import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from chaos.moving_host import HERE, MovingHost
from netlab import Host, NetLab, Topology
from petals.testing.local_swarm import COMMAND, LocalServer, LocalSwarm, LocalSwarmConfig
from petals.types import BlockSpan, PeerId

DAEMON = "p2pd"
CLIENT_HOST, BOOTSTRAP_HOST = "client", "bootstrap"
SERVER_HOSTS = tuple(f"s{number}" for number in range(1, 10))
"""One for each server, and spares for servers that replace dead ones."""


def laboratory(rtt_ms: float, rate: str = "1gbit") -> NetLab:
    """A laboratory with hosts for a cluster and its client, all ``rtt_ms`` apart."""
    hosts = tuple(
        Host(name, up=rate, down=rate) for name in (CLIENT_HOST, BOOTSTRAP_HOST, *SERVER_HOSTS)
    )
    return NetLab(Topology(hosts, rtt_ms=rtt_ms))


class Cluster(LocalSwarm):
    """Context manager, like LocalSwarm. ``config.spans`` has one entry for each server that
    `restore` keeps up. ``folder`` is for the bootstrap peer's identity.
    """

    def __init__(
        self,
        config: LocalSwarmConfig,
        folder: Path,
        lab: NetLab | None = None,
        moving: MovingHost | None = None,
    ) -> None:
        fixed = ("--identity", str(folder / "bootstrap.key"), "--port", str(free_port()))
        super().__init__(replace(config, bootstrap_options=fixed))
        self.lab = lab
        self.moving = moving
        self._starts_there = False
        self._hosts: dict[str, str] = {}
        self._leaving: list[LocalServer] = []
        self._orphaned: list[LocalServer] = []

    def stop(self) -> None:
        for server in self.servers:
            server.process.signal(signal.SIGCONT)
        super().stop()

    def restore(self) -> None:
        """Start what has died and end what is too many."""
        self.restart_bootstrap()
        for server in self._leaving:
            # If it has ended, its group is killed: a daemon outlives its parent for a moment.
            self.end(server)
        self._leaving.clear()
        for server in self._orphaned:
            self._children.remove(server.process)
            server.process.kill()
        self._orphaned.clear()
        missing = Counter(self.config.spans)
        for server in list(self.servers):
            if missing[server.blocks]:
                missing[server.blocks] -= 1
            else:
                self.end(server)
        self.add_servers(*missing.elements())

    def remove_crashed(self) -> list[str]:
        """Remove the servers that ended although no fault ended them; what each logged last.

        A server ends itself, for example, when its books are wrong (``--check-integrity``).
        """
        crashed = [s for s in self.servers if s not in self.alive() and s not in self._leaving]
        told = [f"server {s.blocks} ended by itself: {s.process.log_tail()}" for s in crashed]
        for server in crashed:
            self.end(server)
        return told

    def kill_alone(self, server: LocalServer) -> None:
        """SIGKILL to a server, and not to its network daemon."""
        self.servers.remove(server)
        self._orphaned.append(server)
        server.process.signal(signal.SIGKILL, alone=True)
        server.process.popen.communicate()

    def kill_span(self, blocks: BlockSpan) -> None:
        """SIGKILL to all servers of a span."""
        for server in [server for server in self.servers if server.blocks == blocks]:
            self.kill(server)

    def add_with_options(
        self, blocks: BlockSpan, options: tuple[str, ...], environment: Mapping[str, str] = {}
    ) -> list[LocalServer]:
        """A server with further options and environment variables."""
        usual = self.config
        self.config = replace(usual, server_options=(*usual.server_options, *options))
        os.environ |= environment
        try:
            return self.add_servers(blocks)
        finally:
            self.config = usual
            for name in environment:
                del os.environ[name]

    def add_on_moving_host(self, blocks: BlockSpan) -> None:
        """A server on the host whose address can change."""
        self._starts_there = True
        try:
            self.add_servers(blocks)
        finally:
            self._starts_there = False

    @property
    def bootstrap_pid(self) -> int:
        """The leader of the bootstrap peer's process group."""
        assert self._bootstrap is not None
        return self._bootstrap.popen.pid

    def alive(self) -> list[LocalServer]:
        """Servers whose process has not ended."""
        return [server for server in self.servers if server.process.is_running]

    @property
    def join_addresses(self) -> tuple[str, ...]:
        """The bootstrap peer's addresses, and those of two servers should it be dead."""
        some = [address for server in self.alive()[:2] for address in server.addresses[:1]]
        return (*self.initial_peers, *some)

    def host_of(self, peer: PeerId) -> str:
        """The host of the laboratory that a server runs on."""
        return self._hosts[self.server(peer).process.name]

    def ask_to_leave(self, server: LocalServer) -> None:
        """SIGTERM; `restore` waits for the end of the process."""
        self._leaving.append(server)
        server.process.signal(signal.SIGTERM, alone=True)

    def command(self, name: str, arguments: list[str]) -> list[str]:
        if self.moving is not None:
            words = [*COMMAND, *arguments, "--host"]
            if self._starts_there:
                return self.moving.command([*words, "0.0.0.0"])
            return [*words, HERE]
        if self.lab is None:
            return super().command(name, arguments)
        host = BOOTSTRAP_HOST
        if not name.startswith(BOOTSTRAP_HOST):
            taken = {self._hosts[other.name] for other in self.processes if other.is_running}
            host = next(host for host in SERVER_HOSTS if host not in taken)
        self._hosts[name] = host
        return self.lab.command(host, [*COMMAND, *arguments, "--host", self.lab.ip(host)])


def daemons(pid: int) -> list[psutil.Process]:
    """Network daemons that a process has started; not those of the servers it has started."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if child.name() == DAEMON]
    except psutil.NoSuchProcess:
        return []


def kill_daemons(pid: int) -> None:
    """SIGKILL to the network daemons of a process and to nothing else."""
    for daemon in daemons(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon.kill()


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.05) -> bool:
    """Whether ``condition()`` came true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
