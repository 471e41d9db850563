"""Multiaddresses: the text by which a peer is reached, read once and in one place.

``/ip4/1.2.3.4/tcp/31337/p2p/12D3KooW…`` is a host, a transport with its port, and the peer there;
``…/p2p/<relay>/p2p-circuit/p2p/<peer>`` leads to the peer through a relay. Pure. Must not know the
network.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address

from petals.errors import ConfigError
from petals.types import PeerId

CIRCUIT = "/p2p-circuit"
"""Part of every address that leads through a relay."""

_DIALABLE = re.compile(
    r"/(?P<network>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/(?P<transport>tcp|udp)/(?P<port>\d{1,5})(/|$)"
)
"""Networks whose address is one host. A /dnsaddr may stand for any number of other addresses."""

_PEER = re.compile(r"/p2p/([1-9A-HJ-NP-Za-km-z]{32,64})$")


@dataclass(frozen=True)
class Address:
    """One multiaddress. Any text makes one: what the text does not have is empty."""

    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of_peer(cls, text: str) -> "Address":
        """An address that says which peer is there. Raises ConfigError for any other text."""
        address = cls(text)
        if not text.startswith("/") or not address.peer_id:
            raise ConfigError(
                f"{text!r} is not an address of a peer.",
                hint="It looks like /ip4/1.2.3.4/tcp/31337/p2p/12D3KooW…; the peer prints it.",
            )
        return address

    @classmethod
    def listening(cls, host: str, port: int, transport: str = "tcp") -> "Address":
        """Where a peer listens: an IP address, a port, and "tcp" or "quic". Raises ValueError for a
        host that is no IP address.
        """
        network = f"ip{ip_address(host).version}"
        rest = f"tcp/{port}" if transport == "tcp" else f"udp/{port}/quic-v1"
        return cls(f"/{network}/{host}/{rest}")

    @cached_property
    def _dialable(self) -> re.Match[str] | None:
        return _DIALABLE.match(self.text)

    @property
    def is_dialable(self) -> bool:
        """True if it begins with one host, a transport and a port."""
        return self._dialable is not None

    @property
    def host(self) -> str:
        """The IP address or name: of the relay, if there is one."""
        return self._dialable["host"] if self._dialable else ""

    @property
    def is_ip6(self) -> bool:
        return self._dialable is not None and self._dialable["network"] == "ip6"

    @property
    def transport(self) -> str:
        """ "tcp" or "udp"."""
        return self._dialable["transport"] if self._dialable else ""

    @property
    def port(self) -> int:
        return int(self._dialable["port"]) if self._dialable else 0

    @property
    def peer_id(self) -> PeerId:
        """The peer that the address leads to."""
        match = _PEER.search(self.text)
        return PeerId(match[1] if match else "")

    @property
    def is_relayed(self) -> bool:
        return CIRCUIT in self.text

    @property
    def is_loopback(self) -> bool:
        """True if only processes of the same machine can dial it."""
        return self.text.startswith(("/ip4/127.", "/ip6/::1/"))

    @property
    def seen_host(self) -> str:
        """``/ip4/1.2.3.4``: where the peer itself is seen; empty if a relay is in between."""
        return "" if self.is_relayed else "/".join(self.text.split("/")[:3])

    def with_peer(self, peer: PeerId) -> "Address":
        """The address with the peer's id at its end, once."""
        return self if self.peer_id == peer else Address(f"{self.text}/p2p/{peer}")

    def without_peer(self, peer: PeerId) -> "Address":
        """The address without the peer's id at its end."""
        return Address(self.text.removesuffix(f"/p2p/{peer}"))

    def with_port(self, port: int) -> "Address":
        """The address with another port."""
        if self._dialable is None:
            return self
        start, end = self._dialable.span("port")
        return Address(f"{self.text[:start]}{port}{self.text[end:]}")
