"""Hosts and the paths between them: what a laboratory is set to, as values.

Rates are in bit/s and count 38 bytes of Ethernet framing per packet; 0 is unlimited. Pure: knows no
namespaces and no forwarder.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

MBIT = 1e6

Nat = Literal["none", "firewall", "full-cone", "restricted", "symmetric"]
"""What stands before a host. A firewall translates nothing and lets only replies in."""

_NAME = re.compile(r"^[a-z0-9][a-z0-9_.]{0,30}$")
_MIN_QUEUE_BYTES, _MIN_SLOW_QUEUE_BYTES = 65536, 16384
_SLOW_RATE = 2 * MBIT
"""Rate (bit/s) up to which a queue may be as short as `_MIN_SLOW_QUEUE_BYTES`."""

_FIRST_HOST = 10
_NAMES = {"mbit": MBIT, "gbit": 1000 * MBIT}


def parse_rate(text: str) -> float:
    """ "100mbit" or "1gbit" in bit/s. Raises ValueError."""
    for unit, factor in _NAMES.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(f"{text!r} is no rate; write 100mbit or 1gbit")


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its access link.

    ``up``, ``down``: rates like "100mbit", "" for unlimited. ``queue_ms``: length of the tail-drop
    queue at that rate. ``access_ms``: added to the round trip of each of its paths. ``jitter_ms``:
    standard deviation in each direction. ``loss``: share of the packets, in each direction.
    """

    name: str
    region: str = ""
    up: str = ""
    down: str = ""
    queue_ms: float = 50.0
    access_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    nat: Nat = "none"

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"bad host name {self.name!r}: lower case letters, digits, _ and .")
        if self.nat not in get_args(Nat):
            raise ValueError(f"nat is one of {', '.join(get_args(Nat))}, not {self.nat!r}")
        for rate in (self.up, self.down):
            if rate:
                parse_rate(rate)
        _check_path(self.access_ms, self.jitter_ms, self.loss)


@dataclass(frozen=True, slots=True)
class Path:
    """One direction between two hosts. ``down``: packets vanish silently."""

    rtt_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0
    down: bool = False

    def __post_init__(self) -> None:
        _check_path(self.rtt_ms, self.jitter_ms, self.loss)


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts, and the round trip between any two of them.

    That is ``regions[one][other]``, in either order, if both hosts have a region, else ``rtt_ms``;
    plus the ``access_ms`` of both. A ``subnet`` that looks public matters to software that treats
    private addresses differently.
    """

    hosts: tuple[Host, ...]
    rtt_ms: float = 1.0
    regions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    subnet: str = "10.77.0.0/16"
    seed: int = 1

    def __post_init__(self) -> None:
        for one, other in pairwise(sorted(host.name for host in self.hosts)):
            if one == other:
                raise ValueError(f"host {one} is given twice")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Topology":
        return cls(**{**values, "hosts": tuple(Host(**host) for host in values["hosts"])})

    def host(self, name: str) -> Host:
        """Raises ValueError for an unknown name."""
        return self.hosts[self.index(name)]

    def index(self, name: str) -> int:
        """Raises ValueError for an unknown name."""
        names = [host.name for host in self.hosts]
        if name not in names:
            raise ValueError(f"no host {name!r}; hosts: {' '.join(names)}")
        return names.index(name)

    def ip(self, name: str) -> str:
        """The address that others see: the router's public one for a translated host."""
        network = ipaddress.ip_network(self.subnet)
        # A /24 for each host: software may take hosts of one /24 for neighbours.
        return str(network.network_address + 256 * (self.index(name) + 1) + _FIRST_HOST)

    def own_ip(self, name: str) -> str:
        """The address that the host itself has; another one behind a translating router."""
        if self.host(name).nat in ("none", "firewall"):
            return self.ip(name)
        return f"192.168.{self.index(name) + 1}.2"

    def path(self, source: str, target: str) -> Path:
        """The path from one host to another."""
        one, other = self.host(source), self.host(target)
        rtt_ms = self.regions.get(one.region, {}).get(other.region)
        if rtt_ms is None:
            rtt_ms = self.regions.get(other.region, {}).get(one.region, self.rtt_ms)
        return Path(
            rtt_ms=rtt_ms + one.access_ms + other.access_ms,
            jitter_ms=(one.jitter_ms**2 + other.jitter_ms**2) ** 0.5,
            loss=1 - (1 - one.loss) * (1 - other.loss),
        )

    def changed(self, changes: "Changes") -> "Topology":
        """With the changes of hosts made at run time."""
        hosts = [replace(host, **changes.hosts.get(host.name, {})) for host in self.hosts]
        return replace(self, hosts=tuple(hosts))


@dataclass(slots=True)
class Changes:
    """What was changed at run time: fields of hosts, fields of paths ("a>b"), hosts cut off."""

    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[str, dict[str, Any]] = field(default_factory=dict)
    unplugged: list[str] = field(default_factory=list)


def commands(topology: Topology, changes: Changes) -> list[str]:
    """What makes the forwarder do as the topology and the changes say."""
    topology = topology.changed(changes)
    lines = []
    for index, host in enumerate(topology.hosts):
        up, down = (parse_rate(rate) if rate else 0.0 for rate in (host.up, host.down))
        queues = [_queue_bytes(rate, host.queue_ms) for rate in (up, down)]
        lines.append(f"rate {index} {up:.0f} {queues[0]} {down:.0f} {queues[1]}")
        lines.append(f"plug {index} {int(host.name not in changes.unplugged)}")
        for other_index, other in enumerate(topology.hosts):
            if other is not host:
                path = changed_path(topology, changes, host.name, other.name)
                lines.append(
                    f"path {index} {other_index} {path.rtt_ms / 2 * 1e6:.0f} "
                    f"{path.jitter_ms * 1e6:.0f} {path.loss:.9f} 0 0 {int(path.down)} 0"
                )
    return lines


def changed_path(topology: Topology, changes: Changes, source: str, target: str) -> Path:
    """The path from one host to another with the changes made to it."""
    path = topology.path(source, target)
    return replace(path, **changes.paths.get(f"{source}>{target}", {}))


def check_fields(kind: type[Host] | type[Path], values: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that is no field."""
    unknown = values.keys() - {entry.name for entry in fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")


def _check_path(milliseconds: float, jitter_ms: float, loss: float) -> None:
    if milliseconds < 0 or jitter_ms < 0 or not 0 <= loss <= 1:
        raise ValueError("times are not negative, and a loss is from 0 to 1")


def _queue_bytes(rate: float, queue_ms: float) -> int:
    smallest = _MIN_QUEUE_BYTES if rate > _SLOW_RATE else _MIN_SLOW_QUEUE_BYTES
    return int(max(rate / 8 * queue_ms / 1e3, smallest))


_CITIES = "lon ams fra par hel waw nyc yto chi dal sfo sea".split()
_RTTS_MS = (
    (1, 8, 13, 9, 38, 30, 72, 86, 90, 108, 138, 132),
    (1, 8, 11, 32, 23, 78, 92, 97, 114, 145, 140),
    (1, 11, 26, 18, 84, 98, 103, 120, 151, 146),
    (1, 36, 28, 78, 92, 97, 112, 144, 140),
    (1, 30, 106, 118, 122, 140, 172, 168),
    (1, 102, 114, 120, 138, 168, 164),
    (1, 14, 20, 36, 66, 64),
    (1, 14, 36, 62, 58),
    (1, 24, 48, 46),
    (1, 40, 50),
    (1, 20),
    (1,),
)
"""Round trips between cities, rounded typical values of public networks: row and column from the
city itself on.
"""


def real_world(**changes: Any) -> Topology:
    """14 servers and a client in Europe and North America, 100 to 1000 Mbit/s, 3 to 175 ms apart.

    Four servers accept no inbound connection unasked. ``changes`` are Topology's fields. Rates and
    places are a plausible choice, not measurements of a particular swarm.
    """
    data_centre = {"queue_ms": 50.0, "access_ms": 0.3}
    home = {"queue_ms": 200.0, "access_ms": 6.0, "jitter_ms": 1.0, "loss": 0.0002}
    lab = {"queue_ms": 60.0, "access_ms": 1.5}
    rows: tuple[tuple[str, str, str, str, dict[str, float], Nat], ...] = (
        ("client", "ams", "500mbit", "1gbit", lab, "none"),
        ("s01", "lon", "1gbit", "1gbit", data_centre, "none"),
        ("s02", "ams", "1gbit", "1gbit", data_centre, "none"),
        ("s03", "fra", "1gbit", "1gbit", data_centre, "none"),
        ("s04", "fra", "400mbit", "400mbit", lab, "none"),
        ("s05", "par", "300mbit", "900mbit", lab, "none"),
        ("s06", "hel", "500mbit", "500mbit", lab, "none"),
        ("s07", "waw", "100mbit", "300mbit", home, "restricted"),
        ("s08", "lon", "100mbit", "500mbit", home, "full-cone"),
        ("s09", "nyc", "1gbit", "1gbit", data_centre, "none"),
        ("s10", "yto", "200mbit", "500mbit", lab, "firewall"),
        ("s11", "chi", "500mbit", "500mbit", lab, "none"),
        ("s12", "dal", "100mbit", "400mbit", home, "symmetric"),
        ("s13", "sfo", "1gbit", "1gbit", data_centre, "none"),
        ("s14", "sea", "300mbit", "300mbit", lab, "none"),
    )
    hosts = tuple(
        Host(name, region, up, down, nat=nat, **kind) for name, region, up, down, kind, nat in rows
    )
    regions = {
        city: dict(zip(_CITIES[row:], rtts))
        for row, (city, rtts) in enumerate(zip(_CITIES, _RTTS_MS))
    }
    return Topology(**{"hosts": hosts, "rtt_ms": 50.0, "regions": regions, **changes})
