"""Command-line options, made from the fields of config classes.

A field's ``Setting`` holds the option's name, help text and unit; its type and default are the
field's own. ``with_config`` gives a command the options of a whole config class, ``option_of``
those of single fields. Loads no torch and opens no connection.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from petals import constants
from petals.client.config import ClientConfig
from petals.errors import ConfigError
from petals.server.config import ComputeConfig, ServerConfig
from petals.settings import SettingField, Settings, alternatives, build, fields_of

_PLAIN_TYPES = (bool, int, float, Path)


def with_config(
    kind: type[Settings],
    *,
    leave_out: tuple[str, ...] = (),
    fixed: Mapping[str, object] | None = None,
    heading: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command whose first parameter is a config: its options become the command's.

    ``leave_out`` are paths of fields without an option here. ``fixed`` are values of fields that
    the command sets itself, by path; a function is called when the command runs. ``heading`` is
    that of ``kind``'s own fields in --help. The command's other parameters are declared as usual.
    """
    fields = [
        dataclasses.replace(field, headings=(heading, *field.headings))
        for field in _fields_with_options(kind)
        if field.path not in leave_out
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *others = inspect.signature(command).parameters.values()
        own = [other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others]
        parameters = [*map(_parameter, fields), *own]

        def run(**typed: Any) -> None:
            values = {field.path: _value(field, typed.pop(_key(field))) for field in fields}
            given = {path: value for path, value in values.items() if value is not None}
            for path, value in (fixed or {}).items():
                given[path] = value() if callable(value) else value
            command(build(kind, given), **typed)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__module__ = command.__module__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


class GroupedCommand(TyperCommand):
    """A command whose --help lists options under headings, one per config class."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                heading = getattr(param, "rich_help_panel", None) or kind
                groups.setdefault(heading, []).append(record)
        first = [name for name in ("Arguments", "Options") if name in groups]
        for heading in dict.fromkeys([*first, *groups]):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


def option_of(kind: type[Settings], path: str) -> Any:
    """The typer option of one field, for a command that does not take the whole config."""
    (field,) = (field for field in fields_of(kind) if field.path == path)
    return _declaration(field)


def _fields_with_options(kind: type[Settings]) -> Iterator[SettingField]:
    return (field for field in fields_of(kind) if field.setting.flag)


def _parameter(field: SettingField) -> inspect.Parameter:
    declared: Any = list[plain_type(field)] if is_list(field) else plain_type(field)  # type: ignore[misc]
    is_required = field.default is dataclasses.MISSING
    return inspect.Parameter(
        _key(field),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[declared if is_required else declared | None, _declaration(field)],
    )


def _declaration(field: SettingField) -> Any:
    setting = field.setting
    if not setting.flag.startswith("--"):
        return typer.Argument(metavar=setting.flag, help=setting.help)
    return typer.Option(
        setting.flag,
        metavar=setting.metavar or None,
        help=_help_with_default(field),
        envvar=setting.env or None,
        show_envvar=False,
        show_default=False,
        rich_help_panel=_heading(field) or None,
    )


def _key(field: SettingField) -> str:
    return field.path.replace(".", "__")


def _value(field: SettingField, typed: Any) -> object:
    """The field's value; None for an option that was not typed."""
    if typed is None or (is_list(field) and not typed):
        return None
    return typed * field.setting.scale if field.setting.scale != 1 else typed


def _help_with_default(field: SettingField) -> str:
    default, env = _shown_default(field), field.setting.env
    choices = f" One of {', '.join(field.choices)}." if field.choices else ""
    notes = [f"default: {default}"] * bool(default) + [f"env: {env}"] * bool(env)
    return field.setting.help + choices + (f" [{'; '.join(notes)}]" if notes else "")


def _heading(field: SettingField) -> str:
    return field.headings[-1] if field.headings else ""


def _shown_default(field: SettingField) -> str:
    """As a user would type it; empty if there is none, or if the help text says what happens."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        on, _, off = field.setting.flag.partition("/")
        return (on if value else off).removeprefix("--")
    if isinstance(value, int | float):
        return f"{value / field.setting.scale:g}"
    return str(value)


def is_list(field: SettingField) -> bool:
    return any(get_origin(part) in (tuple, frozenset) for part in alternatives(field.type))


def plain_type(field: SettingField) -> type:
    """What typer reads from the command line: a plain type, text for all that is parsed later."""
    for part in alternatives(field.type):
        plain = get_args(part)[0] if get_origin(part) is Annotated else part
        if plain in _PLAIN_TYPES and field.setting.parse is None:
            return plain
    return str


ModelArgument = Annotated[str, option_of(ServerConfig, "source.model")]
Dtype = Annotated[str, option_of(ComputeConfig, "dtype")]
Join = Annotated[list[str] | None, option_of(ClientConfig, "initial_peers")]
SwarmKeyFile = Annotated[Path | None, option_of(ClientConfig, "swarm_key")]
Threads = Annotated[int | None, option_of(ComputeConfig, "num_threads")]
Revision = Annotated[str | None, option_of(ServerConfig, "source.revision")]
CacheDir = Annotated[str | None, option_of(ServerConfig, "source.cache_dir")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
ChatTemplateName = Annotated[
    str,
    typer.Option(metavar="NAME", help="Which of the tokenizer's named chat templates to use."),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option("--ready-file", metavar="FILE", help="Write this JSON file when online."),
]
UntilStdinCloses = Annotated[
    bool, typer.Option("--until-stdin-closes", help="Stop when standard input ends.")
]


def peers_to_join(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """``addresses``, or those of PETALS_INITIAL_PEERS. Raises ConfigError if there are none."""
    addresses = addresses or constants.initial_peers()
    if not addresses:
        raise ConfigError(
            "No swarm was named, and there is no public swarm to fall back to.",
            hint=f"Add --join ADDR (or set {constants.ENV_INITIAL_PEERS}); "
            "petals swarm up starts a swarm on this machine.",
        )
    return addresses
