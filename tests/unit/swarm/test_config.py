"""What a node listens on."""

import pytest

from petals.errors import ConfigError
from petals.swarm.config import NodeConfig


@pytest.mark.parametrize(
    ("host", "quic", "expected"),
    [
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("44.128.0.1", None, True),
        ("127.0.0.1", None, False),
        ("10.77.0.3", None, False),
        ("127.0.0.1", True, True),
        ("0.0.0.0", False, False),
    ],
)
def test_quic_is_for_links_that_cross_the_internet(
    host: str, quic: bool | None, expected: bool
) -> None:
    listen = NodeConfig(host=host, quic=quic).listen_maddrs
    assert [("/quic-v1" in address) for address in listen] == [False, True][: 1 + expected]
    assert all(f"/{host}/" in address for address in listen)


def test_addresses_given_replace_everything() -> None:
    assert NodeConfig(host_maddrs=("/ip4/1.2.3.4/tcp/5",)).listen_maddrs == ("/ip4/1.2.3.4/tcp/5",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "localhost"},
        {"port": 70_000},
        {"announce_maddrs": ("/ip4/1.2.3.4/tcp/0",)},
        {"initial_peers": "/ip4/1.2.3.4/tcp/5/p2p/x"},
    ],
)
def test_nonsense_is_refused_with_a_hint(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))) as caught:
        NodeConfig(**wrong)
    assert next(iter(wrong)) in caught.value.hint
