"""The `petals` command: registers every other command and turns errors into a sentence and a hint.

Must not import torch, transformers or hivemind, so that `petals --help` answers at once.
"""

from typing import Annotated

import typer

import petals
from petals.cli.commands import (
    bootstrap,
    cache,
    chat,
    demo,
    drain,
    generate,
    models,
    ps,
    serve,
    status,
    swarm,
)
from petals.cli.terminal.console import print_data, run_as_command
from petals.cli.terminal.options import GroupedCommand

app = typer.Typer(
    name="petals",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("serve", cls=GroupedCommand)(serve.serve)
app.command("drain")(drain.drain)
app.command("bootstrap", cls=GroupedCommand)(bootstrap.bootstrap)
app.add_typer(swarm.app, name="swarm")
app.command("generate", cls=GroupedCommand)(generate.generate)
app.command("chat", cls=GroupedCommand)(chat.chat)
app.command("status")(status.status)
app.command("ps")(ps.ps)
app.command("ls")(cache.ls)
app.command("pull")(cache.pull)
app.command("rm")(cache.rm)
app.add_typer(models.app, name="models")


@app.command()
def version() -> None:
    """Print the version."""
    print_data(petals.__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def petals_command_line(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Run large language models on many people's machines, as if they were one."""


def main() -> None:
    """Entry point."""
    run_as_command(app)


if __name__ == "__main__":
    main()
