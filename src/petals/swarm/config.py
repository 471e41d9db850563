"""How a node is set up: addresses, identity, swarm key, bounds.

Frozen values, checked by whoever uses them. Knows no engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from petals.clock import Clock
from petals.swarm.failover_config import SILENCE_SECONDS
from petals.swarm.identity import Identity
from petals.swarm.membership import Admission, SwarmKey
from petals.swarm.transport import Transport

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelLimits:
    """Bounds of channels, checked before memory is taken.

    ``max_tensor_bytes`` is for one message, ``max_inflight_bytes`` for everything this node is
    receiving, ``max_inflight_bytes_per_peer`` for the part of it that one peer may use. Silence is
    measured while something is pending.
    """

    max_tensor_bytes: int = 256 * MIB
    max_inflight_bytes: int = 2048 * MIB
    max_inflight_bytes_per_peer: int = 512 * MIB
    max_streams: int = 4096
    max_streams_per_peer: int = 256
    silence_seconds: float = SILENCE_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One peer's place in the network.

    ``initial_peers`` are multiaddresses of any members; empty starts a swarm of one's own.
    ``host_maddrs``, where given, replaces ``host``, ``port`` and ``quic``. ``quic`` None listens on
    QUIC beside TCP unless ``host`` is a loopback or private address: peers prefer QUIC where they
    see it, and there it would only hide a peer's death, which TCP tells at once. ``identity_path``
    None makes an identity for this run only. ``client_mode`` keeps the node out of other peers'
    tables: it asks but is never asked. ``relay`` says when ``SwarmNode.become_reachable`` turns to
    relays: True always, False never, None if others cannot dial us and we announce no address of
    our own choice. ``use_relay``: dial others through relays. Every ``rejoin_seconds`` the initial
    peers are told of us again, in case they were restarted. ``peer_memory`` is a folder where
    members are remembered; they are tried when no initial peer answers. ``agent`` is what others
    see.
    """

    initial_peers: tuple[str, ...] = ()
    host: str = "0.0.0.0"
    port: int = 0
    quic: bool | None = None
    host_maddrs: tuple[str, ...] = ()
    announce_maddrs: tuple[str, ...] = ()
    identity_path: Path | None = None
    swarm_key: SwarmKey | None = field(default=None, repr=False)
    client_mode: bool = False
    relay: bool | None = None
    use_relay: bool = True
    nat_port_map: bool = False
    rejoin_seconds: float = 30.0
    peer_memory: Path | None = None
    agent: str = ""
    limits: ChannelLimits = ChannelLimits()

    @property
    def listen_maddrs(self) -> tuple[str, ...]:
        """What to listen on, as multiaddresses."""
        if self.host_maddrs:
            return self.host_maddrs
        ip = "ip6" if ":" in self.host else "ip4"
        addresses = [f"/{ip}/{self.host}/tcp/{self.port}"]
        if _is_wide(self.host) if self.quic is None else self.quic:
            addresses.append(f"/{ip}/{self.host}/udp/{self.port}/quic-v1")
        return tuple(addresses)


def _is_wide(host: str) -> bool:
    address = ip_address(host)
    return address.is_unspecified or address.is_global


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is built from."""

    config: NodeConfig
    identity: Identity
    admission: Admission
    clock: Clock


Engine = Callable[[EngineParts], Transport]
"""Builds the transport; the default is libp2p, tests give ``MemoryNet.engine``."""
