"""A running laboratory: its hosts, the programs on them, and faults while they run."""

import atexit
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netlab import processes
from netlab.forwarder import Forwarder
from netlab.processes import NetLabError
from netlab.topology import (
    Changes,
    Host,
    Topology,
    changed_path,
    check_fields,
    commands,
)
from netlab.topology import (
    Path as LinkPath,
)

_INTERFACE = "net0"
_MTU_BYTES = 1500
_UDP_NAT_SECONDS, _TCP_NAT_SECONDS = 60, 7440
"""Idle time after which a router forgets a mapping."""

_CONGESTION_CONTROL = "cubic"
_SYSCTL = {
    f"net.ipv6.conf.{_INTERFACE}.disable_ipv6": "1",
    # Each connection starts from slow start, and none depends on the machine's defaults.
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.tcp_congestion_control": _CONGESTION_CONTROL,
}


class NetLab:
    """A context manager: inside, the hosts are there; afterwards no process on them is left.

    It ends with the process that made it, even if that is killed.
    """

    def __init__(self, topology: Topology, name: str = "") -> None:
        self.topology = topology
        self.name = name or f"t{os.getpid()}x{int(time.monotonic() * 1e3) % 100000}"
        self._changes = Changes()
        self._forwarder = Forwarder(self._folder)
        self._identity: processes.Identity | None = None

    @classmethod
    def attach(cls, name: str) -> "NetLab":
        """A running laboratory of another process. Raises NetLabError if there is none."""
        state = processes.labs().get(name, {})
        if not processes.is_running(state):
            raise NetLabError(f"No laboratory {name!r} is running.")
        lab = cls(Topology.from_json(state["topology"]), name)
        lab._changes = Changes(**state["changes"])
        return lab

    def __enter__(self) -> Self:
        missing = processes.missing()
        if missing:
            raise NetLabError(missing)
        processes.allow_congestion_control(_CONGESTION_CONTROL)
        with processes.registry():
            processes.remove_dead()
            if self._folder.exists():
                raise NetLabError(f"The laboratory {self.name!r} is running already.")
            self._folder.mkdir(mode=0o700)
            self._save()
        atexit.register(self._close)
        try:
            self._identity = self._forwarder.start()
            self._save()
            self._forwarder.command(f"seed {self.topology.seed}")
            for host in self.topology.hosts:
                self._set_up(host)
            self._apply()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    # -- Hosts

    @property
    def hosts(self) -> list[str]:
        return [host.name for host in self.topology.hosts]

    def ip(self, host: str) -> str:
        """The address that others see; see `Topology.ip`."""
        return self.topology.ip(host)

    def link(self, source: str, target: str) -> LinkPath:
        """What the path from one host to another is set to now."""
        topology = self.topology.changed(self._changes)
        return changed_path(topology, self._changes, source, target)

    def stats(self) -> dict[str, float]:
        """The forwarder's counters: CPU seconds, deliveries, how late they were."""
        (line,) = (
            line
            for line in self._forwarder.command("stats").splitlines()
            if line.startswith("fwd ")
        )
        pairs = (word.split("=") for word in line.split()[1:])
        return {name: float(value) for name, value in pairs}

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """The command line that runs ``words`` on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *words]

    def popen(self, host: str, words: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """`subprocess.Popen` on a host, in a session of its own."""
        return subprocess.Popen(self.command(host, words), start_new_session=True, **options)

    def run(
        self, host: str, words: Sequence[str], **options: Any
    ) -> "subprocess.CompletedProcess[Any]":
        """`subprocess.run` on a host."""
        return subprocess.run(self.command(host, words), **options)

    # -- Faults

    def set_link(self, one: str, other: str, *, one_way: bool = False, **fields: Any) -> None:
        """Change ``rtt_ms``, ``jitter_ms``, ``loss`` or ``down`` of a pair, or of one direction."""
        check_fields(LinkPath, fields)
        names = [f"{one}>{other}"] if one_way else [f"{one}>{other}", f"{other}>{one}"]

        def change(changes: Changes) -> None:
            for name in names:
                changes.paths[name] = changes.paths.get(name, {}) | fields

        self._change(change)

    def set_host(self, host: str, **fields: Any) -> None:
        """Change ``up``, ``down``, ``access_ms``, ``loss``, … of a host's access link."""
        check_fields(Host, fields)

        def change(changes: Changes) -> None:
            changes.hosts[host] = changes.hosts.get(host, {}) | fields

        self._change(change)

    def unplug(self, host: str) -> None:
        """The host silently loses its network; its processes keep running."""
        self._change(lambda changes: changes.unplugged.append(host))

    def heal(self) -> None:
        """Undo every change."""
        self._changes = Changes()
        self._apply()

    # -- Inside

    @property
    def _folder(self) -> Path:
        return processes.STATE_ROOT / self.name

    def _namespace(self, host: str) -> str:
        self.topology.index(host)
        return processes.namespace(self.name, host)

    def _save(self) -> None:
        state = {
            "topology": self.topology.as_json(),
            "changes": asdict(self._changes),
            "owner": processes.identity(os.getpid()),
            "forwarder": self._identity,
        }
        draft = self._folder / "state.part"
        draft.write_text(json.dumps(state))
        draft.replace(self._folder / "state.json")

    def _change(self, edit: Callable[[Changes], None]) -> None:
        changes = Changes(**json.loads(json.dumps(asdict(self._changes))))
        edit(changes)
        commands(self.topology, changes)  # raises ValueError before any of it takes effect
        self._changes = changes
        self._apply()

    def _apply(self) -> None:
        for line in commands(self.topology, self._changes):
            self._forwarder.command(line)

    def _set_up(self, host: Host) -> None:
        """Make a host's namespace and its interface, whose other end the forwarder holds."""
        namespace, topology = self._namespace(host.name), self.topology
        ip, own_ip = topology.ip(host.name), topology.own_ip(host.name)
        processes.call(["ip", "netns", "add", namespace])
        self._forwarder.command(
            f"host {topology.index(host.name)} /run/netns/{namespace} {_INTERFACE} {ip} {own_ip} "
            f"{host.nat} {_UDP_NAT_SECONDS} {_TCP_NAT_SECONDS} 0"
        )
        prefix_length = 32 if own_ip == ip else 24
        processes.call(
            ["ip", "-n", namespace, "-batch", "-"],
            input=(
                "link set lo up\n"
                f"link set {_INTERFACE} mtu {_MTU_BYTES} txqueuelen 2000\n"
                f"addr add {own_ip}/{prefix_length} dev {_INTERFACE}\n"
                f"link set {_INTERFACE} up\n"
                f"route add default dev {_INTERFACE}\n"
            ),
        )
        names = {other.name: topology.ip(other.name) for other in topology.hosts}
        names |= {"localhost": "127.0.0.1", host.name: own_ip}
        folder = Path("/etc/netns") / namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in names.items()))
        script = "".join(
            # A kernel without IPv6 has no such file.
            f"test ! -e {path} || echo '{value}' > {path}\n"
            for path, value in ((f"/proc/sys/{k.replace('.', '/')}", v) for k, v in _SYSCTL.items())
        )
        processes.call(["ip", "netns", "exec", namespace, "sh", "-e"], input=script)

    def _close(self) -> None:
        atexit.unregister(self._close)
        self._forwarder.close()
        with processes.registry():
            processes.remove(self.name, self._identity)
        self._forwarder.wait()
