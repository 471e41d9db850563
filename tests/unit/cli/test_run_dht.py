"""The flags of the original's run_dht become the config of a bootstrap peer."""

from pathlib import Path

import pytest

from petals.cli.run_dht import build_parser, translate
from petals.errors import ConfigError
from petals.swarm.config import NodeConfig

PEER = "/ip4/192.0.2.1/tcp/31337/p2p/12D3KooWHCFSQDHRotPdtmYRoyA1zHivs92tCoRFk9Z7bHe7DRNj"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_SWARM_KEY", raising=False)


def config_of(*arguments: str) -> NodeConfig:
    return translate(vars(build_parser().parse_args(arguments)))


def test_defaults() -> None:
    assert config_of() == NodeConfig(relay=False, agent="petals-bootstrap")


def test_flags_find_their_fields() -> None:
    config = config_of(
        *("--initial_peers", PEER, "--host_maddrs", "/ip4/0.0.0.0/tcp/31337"),
        *("--identity_path", "peer.id", "--no_relay", "--use_auto_relay"),
    )
    assert config.initial_peers == (PEER,)
    assert config.host_maddrs == ("/ip4/0.0.0.0/tcp/31337",)
    assert config.identity_path == Path("peer.id")
    assert (config.use_relay, config.relay) == (False, None)


def test_flags_without_effect_warn_or_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config_of("--refresh_period", "10")
    assert "--refresh_period has no effect" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="IPFS"):
        config_of("--use_ipfs")
