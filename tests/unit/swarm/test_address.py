"""Multiaddresses are read in one place; any text makes an address, and garbage an empty one."""

import pytest

from petals.errors import ConfigError
from petals.swarm.address import Address
from petals.types import PeerId

ONE = PeerId("12D3KooWHCFSQDHRotPdtmYRoyA1zHivs92tCoRFk9Z7bHe7DRNj")
RELAY = PeerId("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


def test_a_direct_address() -> None:
    address = Address(f"/ip4/1.2.3.4/tcp/31337/p2p/{ONE}")
    assert (address.host, address.transport, address.port) == ("1.2.3.4", "tcp", 31337)
    assert address.peer_id == ONE
    assert address.is_dialable and not address.is_relayed and not address.is_ip6
    assert str(address) == f"/ip4/1.2.3.4/tcp/31337/p2p/{ONE}"


def test_a_relayed_address_leads_to_the_last_peer() -> None:
    address = Address(f"/ip6/2001:db8::1/udp/4001/quic-v1/p2p/{RELAY}/p2p-circuit/p2p/{ONE}")
    assert address.is_relayed and address.is_ip6
    assert address.peer_id == ONE
    assert address.host == "2001:db8::1"
    assert address.seen_host == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:31337",
        "/",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp",
        "/ip4/1.2.3.4/tcp/123456",
        "/dnsaddr/bootstrap.libp2p.io",
        "/unix/x/streams",
    ],
)
def test_what_cannot_be_dialled(text: str) -> None:
    address = Address(text)
    assert not address.is_dialable
    assert (address.host, address.port, address.peer_id) == ("", 0, "")
    assert address.with_port(5) == address
    with pytest.raises(ConfigError, match="not an address of a peer") as caught:
        Address.of_peer(text)
    assert "/ip4/" in caught.value.hint


def test_a_peer_is_added_and_removed_once_and_a_port_replaced() -> None:
    bare = Address("/ip4/1.2.3.4/tcp/5")
    full = bare.with_peer(ONE)
    assert full.text == f"/ip4/1.2.3.4/tcp/5/p2p/{ONE}"
    assert full.with_peer(ONE) == full
    assert full.without_peer(ONE) == bare.without_peer(ONE) == bare
    assert full.without_peer(RELAY) == full
    other_port = Address("/ip4/0.0.0.0/udp/0/quic-v1").with_port(31337)
    assert other_port.text == "/ip4/0.0.0.0/udp/31337/quic-v1"


@pytest.mark.parametrize(
    ("text", "is_loopback", "seen_host"),
    [
        ("/ip4/127.0.0.1/tcp/5", True, "/ip4/127.0.0.1"),
        ("/ip6/::1/tcp/5", True, "/ip6/::1"),
        ("/ip6/::2/tcp/5", False, "/ip6/::2"),
        ("/ip4/1.2.3.4/tcp/5/p2p/x", False, "/ip4/1.2.3.4"),
        ("/ip4/1.2.3.4/udp/5/quic-v1", False, "/ip4/1.2.3.4"),
        ("/ip4/1.2.3.4/tcp/5/p2p/x/p2p-circuit", False, ""),
        ("", False, ""),
    ],
)
def test_where_a_peer_is_seen(text: str, is_loopback: bool, seen_host: str) -> None:
    assert Address(text).is_loopback is is_loopback
    assert Address(text).seen_host == seen_host


def test_where_a_peer_listens() -> None:
    assert Address.listening("0.0.0.0", 5).text == "/ip4/0.0.0.0/tcp/5"
    assert Address.listening("::", 5, "quic").text == "/ip6/::/udp/5/quic-v1"
    with pytest.raises(ValueError, match="localhost"):
        Address.listening("localhost", 5)
