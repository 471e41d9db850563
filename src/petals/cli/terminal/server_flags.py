"""The flags of the old run_server, each with what it means today.

A table and a parser made from it; pure. Knows no server: `run_server` translates the values.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petals.errors import ConfigError

DEFAULT_CONFIG_FILE = Path("config.yml")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A flag that is accepted and does nothing any more; `instead` says what replaced it."""

    name: str
    instead: str
    takes_value: bool = True


DROPPED = (
    Dropped("daemon_startup_timeout", "the network engine starts within seconds or fails"),
    Dropped("num_handlers", "one process serves everybody; nothing to set"),
    Dropped("prefetch_batches", "the scheduler batches by itself; nothing to set"),
    Dropped("sender_threads", "one event loop sends; nothing to set"),
    Dropped("min_batch_size", "steps never wait for a batch to fill; nothing to set"),
    Dropped("max_chunk_size_bytes", "prefill is cut by the scheduler's latency budget"),
    Dropped("max_disk_space", "weights live in the Hugging Face cache: hf cache prune"),
    Dropped(
        "session_timeout", "a session lives as long as its client; --step_timeout is its lease"
    ),
    Dropped("stats_report_interval", "petals status --join ADDR shows servers"),
    Dropped("custom_module_path", "code from files is not run; use models of transformers"),
    Dropped("tensor_parallel_devices", "run one server per GPU"),
    Dropped("increase_file_limit", "one process needs few files; use ulimit -n if you must"),
    Dropped("request_timeout", "clients set their own (ClientConfig.request_timeout)"),
    Dropped("skip_reachability_check", "not being reachable is only a warning", takes_value=False),
    Dropped("compression", "states travel in the precision of the server (--torch_dtype)"),
)


def build_parser() -> argparse.ArgumentParser:
    """All flags of the old run_server, and --swarm_key."""
    parser = argparse.ArgumentParser(
        prog="python -m petals.cli.run_server",
        description="Serve blocks of a model; the old form of petals serve.",
        argument_default=argparse.SUPPRESS,
    )
    _add_model_flags(parser)
    _add_network_flags(parser)
    _add_limit_flags(parser)
    for flag in DROPPED:
        kind: dict[str, Any] = {"nargs": "+"} if flag.takes_value else {"action": "store_true"}
        parser.add_argument(f"--{flag.name}", help=f"no effect: {flag.instead}", **kind)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="Hugging Face repository or local folder")
    add("-c", "--config", type=Path, help="YAML file with flags (default: ./config.yml if any)")
    add("--converted_model_name_or_path", help="the model, in the old form")
    add("--public_name", help="shown by petals status")
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token", help="Hugging Face access token")
    token.add_argument("--use_auth_token", action="store_true", help="the token you logged in with")
    add("--num_blocks", type=int, help="how many blocks; which ones is chosen")
    add("--block_indices", help="START:END, these blocks and no others")
    add("--dht_prefix", help="name of the model in the directory")
    add("--cache_dir", help="folder for downloaded weights")
    add("--device", help="cpu, cuda or mps")
    add("--torch_dtype", help="auto, float32, bfloat16 or float16")
    add("--quant_type", type=str.lower, choices=("none", "int8", "nf4"), help="weight quantization")
    add("--revision", help="revision of the repository")
    add("--adapters", nargs="*", help="LoRA adapters to preload")


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--initial_peers", nargs="+", help="addresses of peers of the swarm")
    peers.add_argument("--new_swarm", action="store_true", help="start a swarm of one's own")
    add("--swarm_key", type=Path, help="key file of a closed swarm")
    add("--port", type=int, help="port to listen on")
    add("--public_ip", help="IPv4 address that others should dial; needs --port")
    add("--no_auto_relay", action="store_true", help="do not look for relays")
    add("--host_maddrs", nargs="+", help="multiaddresses to listen on")
    add("--announce_maddrs", nargs="+", help="multiaddresses that others should dial")
    add("--identity_path", type=Path, help="private key file")


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--inference_max_length", type=int, help="longest session, in tokens")
    add("--max_batch_size", type=int, help="most tokens in one batch")
    add("--attn_cache_tokens", type=int, help="KV budget, in tokens per block")
    add("--max_alloc_timeout", type=float, help="longest wait for KV memory, in seconds")
    add("--throughput", help="a number, auto, eval or dry_run")
    add("--update_period", type=float, help="seconds between announcements")
    add("--expiration", type=float, help="seconds until an announcement expires")
    add("--balance_quality", type=float, help="move if the swarm is worse than this; 0: never")
    add("--mean_balance_check_period", type=float, help="seconds between looks at the swarm")
    add("--step_timeout", type=float, help="seconds a silent client's session is kept")


def read_flags(arguments: list[str] | None) -> dict[str, Any]:
    """Flags of the config file, overruled by those typed. Raises ConfigError; argparse exits."""
    parser = build_parser()
    typed = vars(parser.parse_args(arguments))
    file = typed.pop("config", None) or (
        DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.is_file() else None
    )
    if file is None:
        return typed
    from_file = vars(parser.parse_args(list(_file_arguments(parser, file))))
    return {**from_file, **typed}


def _file_arguments(parser: argparse.ArgumentParser, file: Path) -> Iterator[str]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The config file {file} cannot be read: {error}", hint="It should be YAML: flag: value"
        ) from error
    known = {action.dest for action in parser._actions}
    if not isinstance(content, dict) or not set(content) <= known:
        unknown = sorted(set(content) - known) if isinstance(content, dict) else [str(content)]
        raise ConfigError(
            f"The config file {file} has flags that do not exist: {', '.join(map(str, unknown))}.",
            hint="python -m petals.cli.run_server --help lists them.",
        )
    for name, value in content.items():
        if name == "model":
            yield str(value)
        elif value is True:
            yield f"--{name}"
        elif isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif value not in (False, None):
            yield from (f"--{name}", str(value))
