"""The original's functions on a hivemind.DHT: which servers hold which blocks."""

from collections.abc import Sequence

from petals.client.config import ClientConfig
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.data_structures import ModuleUID, RemoteModuleInfo, compute_spans, modules_of
from petals.errors import NotSupported
from petals.swarm.directory.records import View

__all__ = ["compute_spans", "declare_active_modules", "get_remote_module_infos"]


def get_remote_module_infos(
    dht: object,
    uids: Sequence[ModuleUID],
    expiration_time: float | None = None,
    active_adapter: str | None = None,
    *,
    latest: bool = False,
) -> list[RemoteModuleInfo]:
    """The servers of each block, those only that have ``active_adapter`` if one is named.

    uids: blocks that follow each other. The newest records are read, whatever ``expiration_time``
    and ``latest``. Raises ConfigError for a dht without peers, BootstrapFailed.
    """
    with RemoteSequenceManager(ClientConfig(), uids, dht=dht) as manager:

        async def read() -> View:
            return await (await manager.access.view()).records()

        modules = modules_of(manager.run(read()), uids)
    for module in modules if active_adapter else ():
        module.servers = {
            peer: info for peer, info in module.servers.items() if active_adapter in info.adapters
        }
    return modules


def declare_active_modules(*args: object, **kwargs: object) -> None:
    """Raises NotSupported: a server signs and renews its own record."""
    raise NotSupported(
        "Servers announce themselves, with a record that they sign.",
        hint="Start one: petals serve MODEL --join ADDR, or petals.server.server.Server.",
    )
