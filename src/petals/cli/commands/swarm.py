"""`petals swarm`: a whole swarm on this machine, and keys for closed swarms.

Starts processes through `testing.local_swarm`. Must not know tensors and messages.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from petals.cli.terminal import options
from petals.cli.terminal.console import interruptible, print_data, say, stage
from petals.errors import SwarmError
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.types import BlockSpan

app = typer.Typer(help="Run a swarm on this machine; make swarm keys.", no_args_is_help=True)

_CHECK_SECONDS = 0.5
"""Pause between two looks for processes that have ended."""


@app.command("up")
def up(
    model: options.ModelArgument,
    servers: Annotated[int, typer.Option(min=1, metavar="N", help="How many servers.")] = 3,
    dtype: options.Dtype = "auto",
    blocks: Annotated[
        list[str] | None,
        typer.Option(metavar="A:B", help="One span per server instead of --servers even ones."),
    ] = None,
    swarm_key: options.SwarmKeyFile = None,
    threads: options.Threads = None,
    state_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON with addresses and servers, once all are online."),
    ] = None,
) -> None:
    """Start a bootstrap peer and N servers here; stay up until Ctrl-C."""
    config = LocalSwarmConfig(model=model, dtype=dtype, swarm_key=swarm_key, num_threads=threads)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    with interruptible():
        with stage(f"Starting a swarm for {Path(model).name}") as activity:
            swarm = LocalSwarm(config, say=activity.change)
            swarm.start(lambda: spans_of(model, servers, blocks))
        with swarm:
            if state_file is not None:
                _write_whole(state_file, json.dumps(swarm.state(), indent=2))
            introduce(swarm)
            stay_up(swarm)
            say("Stopping the swarm")
            if state_file is not None:
                state_file.unlink(missing_ok=True)


@app.command("new-key")
def new_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the key.")],
) -> None:
    """Make the key of a closed swarm: only peers with the file can join."""
    from petals.swarm.identity import create_swarm_key

    create_swarm_key(file)
    say("Give this file to every server and client of the swarm, and to no other peer.")
    print_data(str(file))


def introduce(swarm: LocalSwarm) -> None:
    """Say which server has which blocks."""
    for server in swarm.servers:
        say(f"  server …{server.peer_id[-6:]}  blocks {server.blocks}  pid {server.pid}")


def stay_up(swarm: LocalSwarm) -> None:
    """Say how to join; return at Ctrl-C or SIGTERM.

    Raises SwarmError once no process of the swarm is left.
    """
    with contextlib.suppress(KeyboardInterrupt):
        say("Join with:")
        for address in swarm.initial_peers:
            print_data(address)
        say("Up. Ctrl-C stops everything.")
        _watch(swarm)


def _watch(swarm: LocalSwarm) -> None:
    reported: set[str] = set()
    while len(reported) < len(swarm.processes):
        time.sleep(_CHECK_SECONDS)
        for name in swarm.exited() - reported:
            say(f"{name} ended by itself; the others stay up.")
            reported.add(name)
    raise SwarmError("Every process of the swarm ended.")


def spans_of(model: str, num_servers: int, blocks: list[str] | None) -> tuple[BlockSpan, ...]:
    """The spans typed, or an even cut of the model. Raises ConfigError, ModelNotFound."""
    if blocks:
        return tuple(BlockSpan.parse(text) for text in blocks)
    from petals.models.checkpoint.arch import describe
    from petals.models.checkpoint.sources import open_checkpoint
    from petals.models.loading.cost import split_evenly

    return split_evenly(describe(open_checkpoint(model).config).num_blocks, num_servers)


def _write_whole(path: Path, text: str) -> None:
    """Write a file that other processes wait for, so that they never see half of it."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
