"""Every flag of the old run_server is known; the config file speaks the same language."""

import re
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
    assert set(OLD_FLAGS) <= set(re.findall(r"--(\w+)", build_parser().format_help()))


@pytest.mark.parametrize("flag", DROPPED, ids=lambda flag: flag.name)
def test_a_flag_without_effect_names_its_replacement(flag) -> None:
    assert len(flag.instead) > 10
    value, found = (["1"], ["1"]) if flag.takes_value else ([], True)
    assert read_flags(["m", f"--{flag.name}", *value])[flag.name] == found


def test_new_swarm_and_initial_peers_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as caught:
        read_flags(["m", "--new_swarm", "--initial_peers", "/ip4/127.0.0.1/tcp/1/p2p/x"])
    assert caught.value.code == 2


FILE = """
model: some/model
num_blocks: 4
initial_peers: [/a, /b]
new_swarm: false
skip_reachability_check: true
"""
FLAGS = {
    "model": "some/model",
    "num_blocks": 4,
    "initial_peers": ["/a", "/b"],
    "skip_reachability_check": True,
}


@pytest.mark.parametrize(
    ("file", "arguments", "flags"),
    [
        ("", "m --block_indices 0:10 --new_swarm", {"block_indices": "0:10", "new_swarm": True}),
        ("config.yml", "", FLAGS),
        ("mine.yml", "m -c mine.yml --num_blocks 7", FLAGS | {"num_blocks": 7}),
    ],
    ids=["no file", "found", "overruled"],
)
def test_flags_are_those_typed_and_those_of_the_file(
    file: str, arguments: str, flags: dict[str, object]
) -> None:
    if file:
        Path(file).write_text(FILE)
    typed = arguments.split()
    assert read_flags(typed) == flags | ({"model": "m"} if typed else {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("blocks: 4\n", "do not exist: blocks"),
        ("- model\n", "do not exist"),
        ("model: [\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_config_file_is_refused(content: str | None, message: str) -> None:
    if content is not None:
        Path("mine.yml").write_text(content)
    with pytest.raises(ConfigError, match=rf"mine\.yml.* {message}"):
        read_flags(["-c", "mine.yml"])
