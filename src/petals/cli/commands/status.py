"""`petals status`: which server has which blocks, and which blocks have the fewest servers.

Reads the directory once; `block_map` makes values and lines of it. Knows the swarm layer only.
"""

import asyncio
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.block_map import block_map, draw_map
from petals.cli.terminal.console import print_data, print_json, stage
from petals.errors import MissingBlocksError
from petals.swarm.config import NodeConfig
from petals.swarm.identity import load_swarm_key

if TYPE_CHECKING:
    from petals.swarm.directory.directory import Directory
    from petals.swarm.directory.records import View


def status(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only this model's name.")
    ] = None,
    join: options.Join = None,
    swarm_key: options.SwarmKeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show which server has which blocks.

    The blocks with the fewest servers are marked.
    """
    config = NodeConfig(
        initial_peers=options.peers_to_join(tuple(join or ())),
        swarm_key=None if swarm_key is None else load_swarm_key(swarm_key),
        peer_memory=constants.peers_dir(),
        client_mode=True,
        agent="petals-status",
    )
    with stage("Reading the directory"):
        views = asyncio.run(_read_views(config, model))
    width = shutil.get_terminal_size((120, 24)).columns
    if as_json:
        print_json({"models": [block_map(view) for view in views]})
        return
    if not views:
        print_data("No model has servers in this swarm yet.")
    for view in views:
        for line in draw_map(block_map(view), width):
            print_data(line)


async def _read_views(config: NodeConfig, model: str | None) -> list["View"]:
    """Raises BootstrapFailed, AdmissionDenied, and what ``served_models`` raises."""
    from petals.swarm.node import SwarmNode

    async with SwarmNode(config) as node:
        return await served_models(node.directory, model)


async def served_models(directory: "Directory", model: str | None) -> list["View"]:
    """Views of all models that have servers, or of those that ``model`` names by directory name or
    repository. A model whose servers have all left stays in the directory's own list until that
    entry expires.

    Raises MissingBlocksError if no server has ``model``.
    """
    found = await directory.models()
    views = [await directory.view(each.model, each.num_blocks, whole=True) for each in found]
    served = [(each, view) for each, view in zip(found, views) if view.records]
    wanted = [view for each, view in served if model in (None, each.model, each.repository)]
    if model is not None and not wanted:
        names = ", ".join(each.model for each, _ in served) or "none"
        raise MissingBlocksError(
            f"No server of this swarm has {model}.", hint=f"Models that have servers: {names}."
        )
    return wanted
