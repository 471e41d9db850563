"""The `petals` command: registers every other command and turns errors into a sentence and a hint.

Must not import torch, transformers or hivemind: `petals --help` answers at once.
"""

import sys

import typer

import petals
from petals.cli import bootstrap, chat, demo, generate, models, serve, status, swarm
from petals.cli.console import EXIT_INTERRUPTED, print_data, report
from petals.errors import PetalsError

app = typer.Typer(
    name="petals",
    help="Run large language models on many people's machines, as if they were one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.command("bootstrap")(bootstrap.bootstrap)
app.add_typer(swarm.app, name="swarm")
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("status")(status.status)
app.add_typer(models.app, name="models")


@app.command()
def version() -> None:
    """Print the version."""
    print_data(petals.__version__)


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    try:
        app()
    except PetalsError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
