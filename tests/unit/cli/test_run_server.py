"""Old flags become the config they always meant; others warn or are refused."""

from pathlib import Path

import pytest

from petals.cli.run_server import translate
from petals.cli.terminal.server_flags import read_flags
from petals.errors import ConfigError
from petals.server.config import ClientLimits, LimitsConfig, ServerConfig
from petals.types import BlockSpan

PEER = "/ip4/192.0.2.1/tcp/31337/p2p/12D3KooWHCFSQDHRotPdtmYRoyA1zHivs92tCoRFk9Z7bHe7DRNj"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PETALS_INITIAL_PEERS", raising=False)
    monkeypatch.delenv("PETALS_SWARM_KEY", raising=False)


def config_of(*arguments: str) -> ServerConfig:
    return translate(read_flags(["bigscience/bloom", *arguments]))


def test_a_new_swarm_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("--new_swarm")
    assert config.source.model == "bigscience/bloom"
    assert config.network.initial_peers == ()
    assert (config.limits, config.clients) == (LimitsConfig(), ClientLimits())
    assert (config.moving.enabled, config.moving.policy.enough) == (True, 0.9)
    assert config.compute.dtype == "half"
    assert capsys.readouterr().err == ""


def test_compression_is_the_clients(capsys: pytest.CaptureFixture[str]) -> None:
    config_of("--new_swarm", "--compression", "NONE")
    assert capsys.readouterr().err == ""
    config_of("--new_swarm", "--compression", "float16")
    assert "wire_dtype" in capsys.readouterr().err


def test_flags_find_their_fields() -> None:
    config = config_of(
        *("--initial_peers", PEER, "--port", "31330", "--public_ip", "203.0.113.7"),
        *("--block_indices", "3:7", "--torch_dtype", "float32", "--quant_type", "INT8"),
        *("--inference_max_length", "4096", "--max_batch_size", "2048", "--step_timeout", "90"),
        *("--attn_cache_tokens", "8192", "--max_alloc_timeout", "30", "--throughput", "250"),
        *("--update_period", "40", "--public_name", "lab", "--dht_prefix", "my-bloom"),
        *("--revision", "main", "--identity_path", "server.id", "--no_auto_relay"),
        *("--adapters", "some/lora", "./poems", "--mean_balance_check_period", "240"),
    )
    assert config.blocks == BlockSpan(3, 7)
    assert config.network.initial_peers == (PEER,)
    assert "/ip4/203.0.113.7/tcp/31330" in config.network.announce_maddrs
    assert config.network.identity_path == Path("server.id")
    assert config.network.relay is False
    assert (config.compute.dtype, config.compute.quant) == ("float32", "int8")
    assert (config.limits.max_length, config.limits.max_step_tokens) == (4096, 2048)
    assert (config.clients.lease_seconds, config.clients.max_alloc_seconds) == (90.0, 30.0)
    assert config.memory.cache_tokens == 8192
    assert (config.announce.throughput, config.announce.public_name) == (250.0, "lab")
    assert (config.announce.period_seconds, config.announce.expiry_seconds) == (40.0, 100.0)
    assert (config.source.name, config.source.revision) == ("my-bloom", "main")
    assert config.source.adapters == ("some/lora", "./poems")
    assert config.moving.policy.look_seconds == 240.0


@pytest.mark.parametrize(
    ("quality", "enabled", "enough"), [("0", False, 0.9), ("0.8", True, 0.8), ("1.5", True, 1.5)]
)
def test_balance_quality_0_keeps_a_server_where_it_is(
    quality: str, enabled: bool, enough: float
) -> None:
    moving = config_of("--new_swarm", "--balance_quality", quality).moving
    assert (moving.enabled, moving.policy.enough) == (enabled, enough)


def test_each_dropped_flag_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    config_of("--new_swarm", "--num_handlers", "8", "--tensor_parallel_devices", "cuda:0", "cuda:1")
    handlers, devices = capsys.readouterr().err.splitlines()
    assert handlers.startswith("warning: --num_handlers has no effect any more: ")
    assert "one server per GPU" in devices


def test_peers_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_INITIAL_PEERS", PEER)
    assert config_of().network.initial_peers == (PEER,)
    assert config_of("--new_swarm").network.initial_peers == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--new_swarm", "No model"),
        ("m", "No swarm was named"),
        ("m --new_swarm --public_ip 203.0.113.7", "needs --port"),
        ("m --new_swarm --throughput dry_run", "dry_run is not known"),
        ("m --new_swarm --block_indices 7:3", "not a span"),
        ("m --new_swarm --num_blocks 4 --block_indices 0:4", "Both the blocks"),
        ("m --new_swarm --torch_dtype float8", "dtype='float8' is not allowed"),
        ("m --new_swarm --swarm_key absent.key", "absent.key"),
        ("m --new_swarm --mean_balance_check_period 0", "look_seconds=0"),
    ],
)
def test_contradictions_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        translate(read_flags(arguments.split()))
    assert caught.value.hint
