"""Nodes of the libp2p engine: real daemons on loopback."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from petals.swarm.config import NodeConfig
from petals.swarm.directory.records import ServerRecord
from petals.swarm.node import SwarmNode
from petals.types import ServerState


def config(**changes: Any) -> NodeConfig:
    return NodeConfig(host="127.0.0.1", **({"quic": False} | changes))


def record(**changes: Any) -> ServerRecord:
    fields = {"spans": ((0, 20),), "state": ServerState.ONLINE, "expires_at": time.time() + 60}
    return ServerRecord(peer_id="", model="m", num_blocks=30, **(fields | changes))


@contextlib.asynccontextmanager
async def two_members() -> AsyncIterator[tuple[SwarmNode, SwarmNode]]:
    """A node and another one that has joined it."""
    async with SwarmNode(config()) as one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as other:
            yield one, other


def daemon_of(node: SwarmNode) -> psutil.Process:
    """The daemon that runs with the node's key."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError):
            (key,) = [word[4:] for word in child.cmdline() if word.startswith("-id=")] or [""]
            if key and Path(key).read_bytes() == node.identity.to_bytes():
                return child
    raise AssertionError("the node has no daemon")
