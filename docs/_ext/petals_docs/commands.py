"""The reference of commands, from the command line's own parser."""

from collections.abc import Iterable, Iterator

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from petals.cli.main import app
from petals_docs.markdown import code, table


def render() -> str:
    """One section for each command, one row for each argument and option."""
    root = typer.main.get_command(app)
    return "\n".join(_section(path, command) for path, command in _walk("petals", root))


def _walk(path: str, command: object) -> Iterator[tuple[str, TyperCommand]]:
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            yield from _walk(f"{path} {name}", child)
    elif isinstance(command, TyperCommand):
        yield path, command


def _section(path: str, command: TyperCommand) -> str:
    context = typer.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", f"```text\n{usage}\n```", (command.help or "").strip()]
    for heading, parameters in _by_heading(command).items():
        records = filter(None, (parameter.get_help_record(context) for parameter in parameters))
        parts += [f"**{heading}**", table(("option", "meaning"), _rows(records))]
    return "\n\n".join(parts) + "\n"


def _by_heading(command: TyperCommand) -> dict[str, list[TyperArgument | TyperOption]]:
    """As in --help: arguments, options without a heading, and those with one."""
    groups: dict[str, list[TyperArgument | TyperOption]] = {"Arguments": [], "Options": []}
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            groups["Arguments"].append(parameter)
        elif isinstance(parameter, TyperOption):
            groups.setdefault(parameter.rich_help_panel or "Options", []).append(parameter)
    return {heading: parameters for heading, parameters in groups.items() if parameters}


def _rows(records: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(code(name), meaning) for name, meaning in records]
