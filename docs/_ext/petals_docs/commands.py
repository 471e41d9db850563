"""The reference of commands, from the command line's own parser."""

from collections.abc import Iterator

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
    records = [
        parameter.get_help_record(context)
        for parameter in command.params
        if isinstance(parameter, TyperArgument | TyperOption)
    ]
    rows = [(code(name), meaning) for name, meaning in filter(None, records)]
    parts = [f"## {path}", f"```text\n{usage}\n```", (command.help or "").strip()]
    if rows:
        parts.append(table(("option", "meaning"), rows))
    return "\n\n".join(parts) + "\n"
