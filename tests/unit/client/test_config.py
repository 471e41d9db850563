from pathlib import Path
from types import SimpleNamespace

import pytest

from petals.client.config import ClientConfig
from petals.errors import ConfigError


def test_old_fields_are_accepted() -> None:
    options = {"initial_peers": ["/ip4/1.2.3.4/tcp/1/p2p/Qm"], "max_retries": 2, "torch_dtype": "x"}
    config = ClientConfig.take_from(options)
    assert config.initial_peers == ("/ip4/1.2.3.4/tcp/1/p2p/Qm",)
    assert config.num_retries == 2
    assert options == {"torch_dtype": "x"}


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_INITIAL_PEERS", "/a, /b")
    monkeypatch.setenv("PETALS_SWARM_KEY", "~/swarm.key")
    monkeypatch.setenv("PETALS_MAX_RETRIES", "7")
    config = ClientConfig()
    assert config.initial_peers == ("/a", "/b")
    assert config.swarm_key == Path.home() / "swarm.key"
    assert config.num_retries == 7
    assert ClientConfig(initial_peers="/c", max_retries=0).initial_peers == ("/c",)


def test_peer_ids_may_be_objects() -> None:
    class Engines:
        def __str__(self) -> str:
            return "12D3"

    config = ClientConfig(allowed_servers=[Engines()], blocked_servers=("Qm",))
    assert config.allowed_servers == {"12D3"}
    assert config.blocked_servers == {"Qm"}


def test_taken_from_another_config() -> None:
    model_config = SimpleNamespace(dht_prefix="tiny", ban_timeout=3.0, hidden_size=8)
    config = ClientConfig.of(model_config)
    assert (config.dht_prefix, config.ban_timeout) == ("tiny", 3.0)
    assert ClientConfig.of(config) is config
    assert ClientConfig.of({"dht_prefix": "tiny", "other": 1}).dht_prefix == "tiny"


def test_what_has_no_effect_says_so() -> None:
    with pytest.warns(FutureWarning, match="connect_timeout"):
        ClientConfig(daemon_startup_timeout=60)


@pytest.mark.parametrize(
    "wrong",
    [{"request_timeout": 0}, {"max_retries": -1}, {"initial_peers": 3}, {"allowed_servers": "Qm"}],
)
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        ClientConfig(**wrong)
    assert caught.value.hint


def test_retries_are_finite_and_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_MAX_RETRIES", raising=False)
    config = ClientConfig(min_backoff=1, max_backoff=5)
    assert config.num_retries == 3
    assert [config.backoff_seconds(n) for n in range(6)] == [0, 0, 1, 2, 4, 5]
    assert config.backoff_seconds(10_000) == 5
