"""What processes hold (sessions, KV tokens, tasks, threads, file descriptors), and whether they
release it.

A server reports its own by `GetInfo`; the rest is read from outside. Knows no faults.
"""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Mapping

import psutil

from chaos.cluster import Cluster, daemons, wait_until
from petals.client.connection.event_loop import client_loop
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import PetalsError
from petals.testing.local_swarm import LocalServer
from petals.types import PeerId
from petals.wire.replies import Info
from petals.wire.requests import GetInfo

LEASE_SECONDS = 20.0
"""Lease of the servers under test: how long a session outlives the last message of its client."""

_GRACE_SECONDS = 10.0
"""Beyond a lease: a server looks for expired sessions only a few times per lease."""

_RELEASE_SECONDS = 6.0
"""Longest time until a client or server has released what a closed session held."""

Holdings = Mapping[str, int]
"""What a process holds, by the names in _SERVER_SPARES or _CLIENT_SPARES."""

_SERVER_SPARES = {
    "sessions": 0,
    "KV tokens": 0,
    "outbox bytes": 0,
    # A server keeps channels to the servers it has sent states to, and dials new members.
    "descriptors": 40,
    # A channel is read by one task and served by another.
    "tasks": 80,
    "threads": 4,
}
"""By how much an idle server may hold more than when it was first seen idle."""

_CLIENT_SPARES = {"tasks": 0, "threads": 1, "descriptors": 4, "network daemons": 0}
"""By how much a client's process may hold more after a scenario than before it."""


class LeakCheck:
    """Compares servers with what they held when they were first seen idle.

    Some are excused until later: a session whose close did not reach its server ends by its lease.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._first: dict[PeerId, Holdings] = {}
        self._excused_until: dict[PeerId, float] = {}

    def remember(self, manager: RemoteSequenceManager) -> None:
        """Note what new servers hold."""
        for server in self._cluster.alive():
            if server.peer_id not in self._first:
                held = server_holdings(manager, server)
                if held is not None:
                    self._first[server.peer_id] = {**held, "sessions": 0}

    def excuse(self, server: LocalServer) -> None:
        """The server may keep sessions until their lease is over."""
        self._excused_until[server.peer_id] = time.monotonic() + LEASE_SECONDS + _GRACE_SECONDS

    def leaks(self, manager: RemoteSequenceManager, *, after_leases: bool = False) -> list[str]:
        """What surviving servers still hold, in words.

        Excused ones are looked at only ``after_leases``, whose end is then waited for.
        """
        found = []
        for server in self._cluster.alive():
            first = self._first.get(server.peer_id)
            excused_seconds = self._excused_until.get(server.peer_id, 0.0) - time.monotonic()
            if first is None or (excused_seconds > 0 and not after_leases):
                continue
            leaks = _unreleased(
                # A server that leaves may end meanwhile, and then holds nothing.
                lambda server=server, first=first: (
                    server_holdings(manager, server) if server.process.is_running else first
                ),
                first,
                _SERVER_SPARES,
                _RELEASE_SECONDS + max(0.0, excused_seconds),
            )
            if leaks:
                found += [f"server {server.blocks} …{server.peer_id[-6:]}: {x}" for x in leaks]
                self.excuse(server)
        return found


def server_holdings(manager: RemoteSequenceManager, server: LocalServer) -> Holdings | None:
    """What a server holds now; None if it does not answer."""

    async def ask() -> Info:
        view = await manager.access.view()
        async with await view.node.open_channel(server.peer_id, "blocks", 3.0) as channel:
            info, _ = await channel.request(GetInfo(), expect=Info, timeout=3.0)
        return info

    try:
        info = manager.run(ask())
        process = psutil.Process(server.pid)
        return {
            "sessions": info.num_sessions,
            "KV tokens": -info.tokens_free,
            "outbox bytes": -info.outbox_bytes_free,
            "descriptors": process.num_fds(),
            "tasks": info.num_tasks,
            "threads": process.num_threads(),
        }
    except (PetalsError, psutil.NoSuchProcess):
        return None


def client_holdings() -> Holdings:
    """What this process, the client's, holds now."""

    async def count_tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    gc.collect()
    me = psutil.Process()
    return {
        "tasks": client_loop.run(count_tasks()),
        "threads": threading.active_count(),
        "descriptors": me.num_fds(),
        "network daemons": len(daemons(me.pid)),
    }


def client_leaks(before: Holdings) -> list[str]:
    """What this process holds beyond ``before`` once it has had time to release it, in words."""
    leaks = _unreleased(client_holdings, before, _CLIENT_SPARES, _RELEASE_SECONDS)
    return [f"client: {leak}" for leak in leaks]


def _unreleased(
    ask: Callable[[], Holdings | None], first: Holdings, spares: Mapping[str, int], seconds: float
) -> list[str]:
    """What is held beyond ``first`` and ``spares`` after ``seconds``; returns once that is none."""
    leaks: list[str] = []

    def is_clean() -> bool:
        now = ask()
        if now is None:
            leaks[:] = ["does not answer"]
        else:
            more = {name: now[name] - first[name] for name in spares}
            leaks[:] = [f"{n} more {name}" for name, n in more.items() if n > spares[name]]
        return not leaks

    wait_until(is_clean, seconds, pause=0.1)
    return leaks
