"""How a node is set up: addresses, identity, swarm key, limits.

Frozen values, checked when they are made. Must not know an engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from petals import constants
from petals.clock import Clock
from petals.errors import ConfigError
from petals.settings import PositiveFloat, PositiveInt, Setting, Settings
from petals.swarm.address import Address
from petals.swarm.failover_config import SILENCE_SECONDS
from petals.swarm.identity import Identity, load_swarm_key
from petals.swarm.membership import Admission, SwarmKey
from petals.swarm.transport import Transport

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelLimits(Settings):
    """Limits of channels, checked before memory is allocated."""

    max_tensor_bytes: Annotated[PositiveInt, Setting("Most bytes of tensors in one message.")] = (
        256 * MIB
    )
    max_inflight_bytes: Annotated[
        PositiveInt, Setting("Memory for all messages that this node is receiving.")
    ] = 2048 * MIB
    max_inflight_bytes_per_peer: Annotated[
        PositiveInt, Setting("The part of max_inflight_bytes that one peer may use.")
    ] = 512 * MIB
    max_streams: Annotated[PositiveInt, Setting("Inbound streams in all.")] = 4096
    max_streams_per_peer: Annotated[PositiveInt, Setting("Inbound streams of one peer.")] = 256
    silence_seconds: Annotated[
        PositiveFloat,
        Setting("A peer that sends no frame for this long while something is pending is lost."),
    ] = SILENCE_SECONDS
    send_seconds: Annotated[
        PositiveFloat,
        Setting(
            "Base of the time limit for sending one message, credit wait included; the limit is "
            "send_seconds + num_bytes / min_bytes_per_second."
        ),
    ] = 30.0
    min_bytes_per_second: Annotated[
        PositiveFloat, Setting("Slowest rate at which a peer may take a message.")
    ] = 64 * 1024.0


def _swarm_key(given: object) -> object:
    """The file of a key in place of the key."""
    return load_swarm_key(Path(given).expanduser()) if isinstance(given, str | Path) else given


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig(Settings):
    """One peer's place in the network."""

    initial_peers: Annotated[
        tuple[str, ...],
        Setting(
            "Address of a member of the swarm; may be repeated. Without it the peer starts a new "
            "swarm.",
            "--join",
            "ADDR",
        ),
    ] = ()
    swarm_key: Annotated[
        SwarmKey | None,
        Setting(
            "Key file of a closed swarm.",
            "--swarm-key",
            "FILE",
            env=constants.ENV_SWARM_KEY,
            parse=_swarm_key,
        ),
    ] = field(default=None, repr=False)
    host: Annotated[str, Setting("IP address to listen on.", "--host", "IP")] = "0.0.0.0"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)],
        Setting("Port to listen on; 0: any free port.", "--port", "PORT"),
    ] = 0
    quic: Annotated[
        bool | None,
        Setting(
            "Listen on QUIC beside TCP; by default unless the host is a loopback or private "
            "address.",
            "--quic/--no-quic",
        ),
    ] = None
    """Peers prefer QUIC where it is offered. On a local network it would only delay the detection
    of a dead peer, which TCP reports at once.
    """
    host_maddrs: Annotated[
        tuple[str, ...],
        Setting(
            "Multiaddress to listen on, in place of --host, --port and --quic; may be repeated.",
            "--listen",
            "ADDR",
        ),
    ] = ()
    announce_maddrs: Annotated[
        tuple[str, ...],
        Setting(
            "Multiaddress at which others reach this peer, if it differs; may be repeated.",
            "--announce",
            "ADDR",
        ),
    ] = ()
    relay: Annotated[
        bool | None,
        Setting(
            "Be reached through other members, always or never; by default if others cannot dial "
            "this peer and --announce is not given.",
            "--relay/--no-relay",
        ),
    ] = None
    use_relay: Annotated[bool, Setting("Dial others through relays where necessary.")] = True
    nat_port_map: Annotated[
        bool,
        Setting("Ask the router to forward the port (UPnP, NAT-PMP).", "--port-map/--no-port-map"),
    ] = False
    identity_path: Annotated[
        Path | None,
        Setting(
            "File of the private key, made if it is missing; keeps the peer id over restarts.",
            "--identity",
            "FILE",
        ),
    ] = None
    client_mode: Annotated[
        bool, Setting("Ask other peers, but answer none: keep out of their tables.")
    ] = False
    rejoin_seconds: Annotated[
        PositiveFloat,
        Setting("Period at which the initial peers, perhaps restarted, are joined again."),
    ] = 30.0
    peer_memory: Annotated[
        Path | None,
        Setting("Folder where members are recorded, to be dialled if no initial peer answers."),
    ] = None
    agent: Annotated[str, Setting("Name of this program, shown to other peers.")] = ""
    limits: Annotated[ChannelLimits, Setting("Limits of channels")] = ChannelLimits()

    def check(self) -> None:
        """Raises ConfigError for a host that is no IP address, or an announced port 0."""
        try:
            ip_address(self.host)
        except ValueError:
            raise ConfigError(
                f"host={self.host!r} is not an IP address.",
                hint="host (--host): 0.0.0.0 listens on all interfaces, 127.0.0.1 on this machine.",
            ) from None
        for text in self.announce_maddrs:
            address = Address(text)
            if address.is_dialable and address.port == 0:
                raise ConfigError(
                    f"Others cannot dial port 0: announce_maddrs has {text}.",
                    hint="announce_maddrs (--announce): fix the port with --port, announce it.",
                )

    @property
    def listen_maddrs(self) -> tuple[str, ...]:
        """What to listen on, as multiaddresses."""
        if self.host_maddrs:
            return self.host_maddrs
        with_quic = _crosses_internet(self.host) if self.quic is None else self.quic
        transports = ("tcp", "quic") if with_quic else ("tcp",)
        return tuple(str(Address.listening(self.host, self.port, name)) for name in transports)


def _crosses_internet(host: str) -> bool:
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
