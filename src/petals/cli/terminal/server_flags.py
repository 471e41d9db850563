"""The flags of the original's run_server, each with what it means today.

Tables and a parser made from them; types and help texts are those of the config's fields. Pure:
`run_server` translates the values.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petals.cli.terminal.options import is_list, plain_type
from petals.errors import ConfigError
from petals.server.config import ServerConfig
from petals.settings import Settings, fields_of

DEFAULT_CONFIG_FILE = Path("config.yml")


KEPT = {
    "num_blocks": "num_blocks",
    "block_indices": "blocks",
    "dht_prefix": "source.name",
    "revision": "source.revision",
    "cache_dir": "source.cache_dir",
    "adapters": "source.adapters",
    "device": "compute.device",
    "torch_dtype": "compute.dtype",
    "quant_type": "compute.quant",
    "attn_cache_tokens": "memory.cache_tokens",
    "initial_peers": "network.initial_peers",
    "swarm_key": "network.swarm_key",
    "port": "network.port",
    "host_maddrs": "network.host_maddrs",
    "announce_maddrs": "network.announce_maddrs",
    "identity_path": "network.identity_path",
    "inference_max_length": "limits.max_length",
    "max_batch_size": "limits.max_step_tokens",
    "step_timeout": "clients.lease_seconds",
    "max_alloc_timeout": "clients.max_alloc_seconds",
    "public_name": "announce.public_name",
    "update_period": "announce.period_seconds",
    "expiration": "announce.expiry_seconds",
    "mean_balance_check_period": "moving.policy.look_seconds",
}
"""Flags that are fields of ServerConfig under another name: flag -> path of the field."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A flag that is accepted without effect; `instead` names its replacement."""

    name: str
    instead: str
    takes_value: bool = True


DROPPED = (
    Dropped("daemon_startup_timeout", "the network engine starts within seconds or fails"),
    Dropped("num_handlers", "one process serves all clients; nothing to set"),
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
)


def build_parser() -> argparse.ArgumentParser:
    """All flags of the original's run_server, and --swarm_key."""
    parser = argparse.ArgumentParser(
        prog="python -m petals.cli.run_server",
        description="Serve blocks of a model; the original's form of petals serve.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("model", nargs="?", help="Hugging Face repository or local folder")
    add("-c", "--config", type=Path, help="YAML file with flags (default: ./config.yml if any)")
    add("--converted_model_name_or_path", help="the model, in another form")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--new_swarm", action="store_true", help="start a new swarm")
    for flag, kind in field_flags(ServerConfig, KEPT).items():
        into = peers if flag == "initial_peers" else parser
        into.add_argument(f"--{flag}", **kind)
    _add_special_flags(parser)
    for dropped in DROPPED:
        form: dict[str, Any] = {"nargs": "+"} if dropped.takes_value else {"action": "store_true"}
        add(f"--{dropped.name}", help=f"no effect: {dropped.instead}", **form)
    return parser


def field_flags(kind: type[Settings], table: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What argparse needs to know of the flags in ``table`` (flag -> path of a field): type, number
    of values and help text are the field's.
    """
    fields = {field.path: field for field in fields_of(kind)}
    return {
        flag: {
            "type": str.lower if fields[path].choices else plain_type(fields[path]),
            "nargs": "*" if is_list(fields[path]) else None,
            "help": fields[path].setting.help.replace("%", "%%"),
        }
        for flag, path in table.items()
    }


def spelling(kind: type[Settings], table: Mapping[str, str]) -> dict[str, str]:
    """The options of today (``--swarm-key``) -> flags of the original, for hints."""
    options = {field.path: field.setting.flag for field in fields_of(kind)}
    return {options[path]: f"--{flag}" for flag, path in table.items() if options[path]}


def _add_special_flags(parser: argparse.ArgumentParser) -> None:
    """Flags whose values are not those of a field."""
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token", help="Hugging Face access token")
    token.add_argument("--use_auth_token", action="store_true", help="the token of your login")
    add = parser.add_argument
    add("--public_ip", help="IPv4 address at which others reach this peer; needs --port")
    add("--no_auto_relay", action="store_true", help="never be reached through relays")
    add("--throughput", help="a number, auto or eval")
    add("--compression", type=str.upper, help="NONE; otherwise no effect: clients set wire_dtype")
    add("--balance_quality", type=float, help="move if the swarm is worse than this; 0: never")


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
