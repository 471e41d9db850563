"""The `petals` command: registers every other command and turns errors into a sentence and a hint.

Must not import torch, transformers or hivemind, so that `petals --help` answers at once.
"""

import typer

import petals
from petals.cli.commands import bootstrap, chat, demo, drain, generate, models, serve, status, swarm
from petals.cli.terminal.console import print_data, run_as_command
from petals.cli.terminal.options import GroupedCommand

app = typer.Typer(
    name="petals",
    help="Run large language models on many people's machines, as if they were one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("serve", cls=GroupedCommand)(serve.serve)
app.command("drain")(drain.drain)
app.command("bootstrap", cls=GroupedCommand)(bootstrap.bootstrap)
app.add_typer(swarm.app, name="swarm")
app.command("generate", cls=GroupedCommand)(generate.generate)
app.command("chat", cls=GroupedCommand)(chat.chat)
app.command("status")(status.status)
app.add_typer(models.app, name="models")


@app.command()
def version() -> None:
    """Print the version."""
    print_data(petals.__version__)


def main() -> None:
    """Entry point."""
    run_as_command(app)


if __name__ == "__main__":
    main()
