"""The swarm nodes of this process: managers of the same swarm share one, closed with its last user.

Runs in an event loop. Knows addresses and keys; knows no models and no routes.
"""

import asyncio
from dataclasses import dataclass

from petals import constants
from petals.client.config import ClientConfig
from petals.errors import ConfigError
from petals.swarm.config import Engine, NodeConfig
from petals.swarm.identity import load_swarm_key
from petals.swarm.node import SwarmNode

_Key = tuple[asyncio.AbstractEventLoop, frozenset[str], object]


@dataclass(slots=True)
class _Shared:
    starting: "asyncio.Task[SwarmNode]"
    num_users: int = 0


class NodePool:
    """Nodes by event loop, bootstrap addresses and swarm key."""

    def __init__(self) -> None:
        self._nodes: dict[_Key, _Shared] = {}
        self.engines: dict[str, Engine] = {}
        """Networks other than libp2p, by the initial peer that is reached through them."""

    async def acquire(self, config: ClientConfig) -> SwarmNode:
        """A running node; call ``release`` after use.

        Raises ConfigError without any address, BootstrapFailed if no address answers in time.
        """
        if not config.initial_peers:
            raise ConfigError(
                "No swarm is named.",
                hint="Pass initial_peers=[ADDR, ...] or set PETALS_INITIAL_PEERS; "
                "`petals demo --keep` starts a swarm and prints its address.",
            )
        key = (
            asyncio.get_running_loop(),
            frozenset(config.initial_peers),
            config.swarm_key,
        )
        shared = self._nodes.get(key)
        if shared is None:
            shared = self._nodes[key] = _Shared(asyncio.create_task(self._start(config)))
        shared.num_users += 1
        try:
            # Shielded: a caller that is cancelled must not end the start for the other users.
            return await asyncio.shield(shared.starting)
        except BaseException:
            await self._leave(key, shared)
            raise

    async def _start(self, config: ClientConfig) -> SwarmNode:
        key = None if config.swarm_key is None else load_swarm_key(config.swarm_key)
        engine = self.engines.get(config.initial_peers[0])
        network = NodeConfig(
            initial_peers=config.initial_peers,
            swarm_key=key,
            client_mode=True,
            # Only addresses of libp2p outlive this process.
            peer_memory=constants.peers_dir() if engine is None else None,
        )
        return await SwarmNode(network, engine=engine).__aenter__()

    async def release(self, node: SwarmNode) -> None:
        """Close the node if the caller was its last user."""
        for key, shared in list(self._nodes.items()):
            if shared.starting.done() and _result(shared.starting) is node:
                await self._leave(key, shared)

    async def _leave(self, key: _Key, shared: _Shared) -> None:
        shared.num_users -= 1
        if shared.num_users:
            return
        if self._nodes.get(key) is shared:
            del self._nodes[key]
        if not shared.starting.done():
            shared.starting.cancel()
            await asyncio.wait([shared.starting])
        node = _result(shared.starting)
        if node is not None:
            await node.close()


def _result(task: "asyncio.Task[SwarmNode]") -> SwarmNode | None:
    return None if task.cancelled() or task.exception() is not None else task.result()


nodes = NodePool()
"""The only one of the process."""
