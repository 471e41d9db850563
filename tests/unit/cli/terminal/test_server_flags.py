"""Every flag of the old run_server is known; the config file speaks the same language."""

from pathlib import Path

import pytest

from petals.cli.terminal.server_flags import DROPPED, build_parser, read_flags
from petals.errors import ConfigError

OLD_FLAGS = """
    config converted_model_name_or_path public_name token use_auth_token num_blocks block_indices
    dht_prefix port public_ip no_auto_relay host_maddrs announce_maddrs daemon_startup_timeout
    compression num_handlers prefetch_batches sender_threads inference_max_length min_batch_size
    max_batch_size max_chunk_size_bytes attn_cache_tokens cache_dir max_disk_space device
    torch_dtype max_alloc_timeout revision throughput update_period expiration request_timeout
    session_timeout step_timeout initial_peers new_swarm increase_file_limit stats_report_interval
    custom_module_path identity_path balance_quality mean_balance_check_period quant_type
    tensor_parallel_devices skip_reachability_check adapters
""".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_old_flags_are_there() -> None:
    known = {action.dest for action in build_parser()._actions}
    assert set(OLD_FLAGS) <= known


def test_only_what_was_typed_is_returned() -> None:
    flags = read_flags(["some/model", "--block_indices", "0:10", "--new_swarm"])
    assert flags == {"model": "some/model", "block_indices": "0:10", "new_swarm": True}


def test_a_flag_without_effect_names_its_replacement() -> None:
    for flag in DROPPED:
        assert len(flag.instead) > 10
        value, found = (["1"], ["1"]) if flag.takes_value else ([], True)
        assert read_flags(["m", f"--{flag.name}", *value])[flag.name] == found


def test_new_swarm_and_initial_peers_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as caught:
        read_flags(["m", "--new_swarm", "--initial_peers", "/ip4/127.0.0.1/tcp/1/p2p/x"])
    assert caught.value.code == 2


def test_a_config_file_in_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(
        "model: some/model\nnum_blocks: 4\ninitial_peers: [/a, /b]\nnew_swarm: false\n"
        "skip_reachability_check: true\n"
    )
    assert read_flags([]) == {
        "model": "some/model",
        "num_blocks": 4,
        "initial_peers": ["/a", "/b"],
        "skip_reachability_check": True,
    }


def test_the_command_line_overrules_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("model: some/model\nnum_blocks: 4\n")
    flags = read_flags(["other/model", "-c", str(file), "--num_blocks", "7"])
    assert flags == {"model": "other/model", "num_blocks": 7}


@pytest.mark.parametrize("content", ["blocks: 4\n", "- model\n", "model: [\n"])
def test_a_wrong_config_file_is_told(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.yml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.yml"):
        read_flags(["-c", str(file)])


def test_a_missing_config_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_flags(["-c", str(tmp_path / "absent.yml")])
