"""Options are made from config fields: names, defaults and units meet in one place."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from petals.cli.main import app
from petals.cli.terminal import options
from petals.cli.terminal.options import GroupedCommand, with_config
from petals.client.config import ClientConfig
from petals.server.config import (
    ClientLimits,
    ComputeConfig,
    LimitsConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.settings import Settings
from petals.swarm.config import NodeConfig
from petals.swarm.identity import create_swarm_key
from petals.types import BlockSpan

PEER = "/ip4/192.0.2.1/tcp/31337/p2p/12D3KooWHCFSQDHRotPdtmYRoyA1zHivs92tCoRFk9Z7bHe7DRNj"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PETALS_INITIAL_PEERS", "PETALS_SWARM_KEY", "PETALS_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)


def parsed(kind: type[Settings], *arguments: str, **kwargs: object) -> Settings:
    """The config that a command with these options gets."""
    got: list[Settings] = []
    command = typer.Typer()

    @command.command(cls=GroupedCommand)
    @with_config(kind, **kwargs)
    def run(config: Settings, ready_file: options.ReadyFile = None) -> None:
        got.append(config)

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_without_options_a_config_holds_its_defaults() -> None:
    assert parsed(ServerConfig, "m") == ServerConfig(source=SourceConfig(model="m"))
    assert parsed(ClientConfig) == ClientConfig()


def test_options_find_their_fields(tmp_path: Path) -> None:
    key = create_swarm_key(tmp_path / "swarm.key")
    config = parsed(
        ServerConfig,
        *("some/model", "--join", PEER, "--join", PEER + "x", "--blocks", "3:7"),
        *("--dtype", "float32", "--threads", "2", "--training-cache", "64", "--no-training"),
        *("--lease", "90", "--no-relay", "--port", "31330", "--identity", "server.id"),
        *("--swarm-key", str(tmp_path / "swarm.key"), "--adapters", "a", "--adapters", "b"),
        *("--no-rebalance", "--rebalance-every", "120", "--drain-seconds", "5"),
    )
    assert isinstance(config, ServerConfig)
    assert config.source == SourceConfig(model="some/model", adapters=("a", "b"))
    assert config.blocks == BlockSpan(3, 7)
    assert config.compute == ComputeConfig(dtype="float32", num_threads=2)
    assert config.memory == MemoryConfig(training_bytes=64 * 2**20)
    assert config.limits == LimitsConfig(allow_training=False)
    assert config.clients == ClientLimits(lease_seconds=90.0)
    assert config.network == NodeConfig(
        initial_peers=(PEER, PEER + "x"),
        relay=False,
        port=31330,
        identity_path=Path("server.id"),
        swarm_key=key,
    )
    assert (config.moving.enabled, config.moving.policy.look_seconds) == (False, 120.0)
    assert config.drain_seconds == 5.0


def test_an_environment_variable_stands_in_for_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETALS_SWARM_KEY", str(tmp_path / "swarm.key"))
    monkeypatch.setenv("PETALS_INITIAL_PEERS", "/a, /b")
    key = create_swarm_key(tmp_path / "swarm.key")
    server = parsed(ServerConfig, "m")
    assert isinstance(server, ServerConfig)
    assert server.network.swarm_key == key
    assert server.network.initial_peers == ()  # a server without --join starts a swarm
    client = parsed(ClientConfig)
    assert isinstance(client, ClientConfig)
    assert client.initial_peers == ("/a", "/b")


def test_a_command_may_set_fields_itself() -> None:
    config = parsed(NodeConfig, fixed={"agent": "me", "peer_memory": lambda: Path("peers")})
    assert config == NodeConfig(agent="me", peer_memory=Path("peers"))


def test_an_option_can_be_left_out() -> None:
    command = typer.Typer()
    command.command()(with_config(NodeConfig, leave_out=("port",))(lambda config: None))
    assert CliRunner().invoke(command, ["--port", "3"]).exit_code == 2


def test_help_lists_options_by_group_with_defaults_and_variables() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    groups = [line[:-1] for line in text.splitlines() if line[:1].strip() and line.endswith(":")]
    assert groups[:4] == ["Arguments", "Options", "Model", "Network"]
    assert len(groups) == len(set(groups))
    text = " ".join(text.split())
    assert "[env: PETALS_SWARM_KEY]" in text
    assert "[default: 60]" in text
    assert "--training / --no-training" in text
