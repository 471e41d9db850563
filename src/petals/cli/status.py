"""`petals status`: who serves which blocks, and where the swarm is thinnest.

`block_map` and `draw_map` are pure: a view in, values and lines out. Knows the swarm layer only.
"""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals.cli import options
from petals.cli.console import print_data, print_json, stage
from petals.errors import MissingBlocksError

if TYPE_CHECKING:
    from petals.swarm.config import NodeConfig
    from petals.swarm.records import View

MAP_WIDTH = 60


def status(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only this model's name.")
    ] = None,
    join: options.Join = None,
    swarm_key: options.SwarmKeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show which block is served by whom; the thinnest place is marked."""
    from petals.swarm.config import NodeConfig

    config = NodeConfig(
        initial_peers=options.peers_to_join(join),
        swarm_key=options.read_swarm_key(swarm_key),
        client_mode=True,
        agent="petals-status",
    )
    with stage("Reading the directory"):
        views = asyncio.run(_read_views(config, model))
    if as_json:
        print_json({"models": [block_map(view) for view in views]})
        return
    if not views:
        print_data("Nobody serves a model in this swarm yet.")
    for view in views:
        for line in draw_map(block_map(view)):
            print_data(line)


async def _read_views(config: "NodeConfig", model: str | None) -> list["View"]:
    """Views of all models, or of those that `model` names by directory name or repository.

    Raises BootstrapFailed, AdmissionDenied, and MissingBlocksError if nobody serves `model`.
    """
    from petals.swarm.node import SwarmNode

    async with SwarmNode(config) as node:
        found = await node.directory.models()
        wanted = [each for each in found if model in (None, each.model, each.repository)]
        if model is not None and not wanted:
            names = ", ".join(each.model for each in found) or "none"
            raise MissingBlocksError(
                f"Nobody serves {model} in this swarm.", hint=f"Models announced here: {names}."
            )
        return [
            await node.directory.view(each.model, each.num_blocks, whole=True) for each in wanted
        ]


def block_map(view: "View") -> dict[str, Any]:
    """The view as plain values. `thinnest` are the blocks with the fewest ONLINE servers."""
    coverage = view.coverage()
    fewest = min(coverage, default=0)
    servers = sorted(view.records.values(), key=lambda record: (record.spans, record.peer_id))
    return {
        "model": view.model,
        "num_blocks": view.num_blocks,
        "complete": fewest > 0,
        "coverage": list(coverage),
        "thinnest": {
            "num_servers": fewest,
            "blocks": [block for block, count in enumerate(coverage) if count == fewest],
        },
        "missing": [[gap.start, gap.end] for gap in view.missing()],
        "servers": [
            {
                "peer_id": record.peer_id,
                "public_name": record.public_name,
                "state": str(record.state),
                "spans": [list(span) for span in record.spans],
                "dtype": record.dtype,
                "quant": record.quant,
                "throughput": round(record.throughput, 2),
                "cache_tokens": record.cache_tokens,
                "max_length": record.max_length,
                "version": record.version,
                "relayed": record.relayed,
            }
            for record in servers
        ],
        "blocks": [
            {"block": block, "servers": [record.peer_id for record in view.holders(block)]}
            for block in range(view.num_blocks)
        ],
    }


def draw_map(found: dict[str, Any]) -> list[str]:
    """The block map as lines of text: one row per server, one of counts, one that marks."""
    num_blocks = found["num_blocks"]
    columns = _columns(num_blocks)
    name_width = max([len(_name(server)) for server in found["servers"]] + [7])
    state = "complete" if found["complete"] else "INCOMPLETE"
    lines = [f"{found['model']}: {num_blocks} blocks, {len(found['servers'])} servers, {state}"]
    for server in found["servers"]:
        bar = "".join(_cell(server, start, end) for start, end in columns)
        spans = " ".join(f"{start}:{end}" for start, end in server["spans"])
        rest = f"{spans}  {server['state']}  {server['dtype']}  {server['throughput']:.1f} tok/s"
        lines.append(f"  {_name(server):<{name_width}}  {bar}  {rest}")
    coverage, thin = found["coverage"], found["thinnest"]
    counts = [min(coverage[start:end]) for start, end in columns]
    digits = "".join(str(min(count, 9)) for count in counts)
    marks = "".join("^" if count == thin["num_servers"] else " " for count in counts)
    lines.append(f"  {'servers':<{name_width}}  {digits}")
    lines.append(f"  {'':<{name_width}}  {marks}  {_thinnest(thin)}")
    return lines


def _columns(num_blocks: int) -> list[tuple[int, int]]:
    """Blocks under each character; large models share a character between neighbours."""
    per_column = max(1, -(-num_blocks // MAP_WIDTH))
    starts = range(0, num_blocks, per_column)
    return [(start, min(start + per_column, num_blocks)) for start in starts]


def _cell(server: dict[str, Any], start: int, end: int) -> str:
    held = any(s < end and start < e for s, e in server["spans"])
    if not held:
        return "·"
    return "█" if server["state"] == "online" else "░"


def _name(server: dict[str, Any]) -> str:
    short = f"…{server['peer_id'][-6:]}"
    return f"{server['public_name']} {short}" if server["public_name"] else short


def _thinnest(thin: dict[str, Any]) -> str:
    count, blocks = thin["num_servers"], thin["blocks"]
    if not blocks:
        return ""
    where = f"{len(blocks)} blocks, first {blocks[0]}" if len(blocks) > 1 else f"block {blocks[0]}"
    if count == 0:
        return f"^ nobody: {where}"
    servers = "server" if count == 1 else "servers"
    return f"^ thinnest, {count} {servers}: {where}"
