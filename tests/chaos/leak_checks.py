"""What processes hold (sessions, KV tokens, tasks, threads, file descriptors), and whether they
release it.

A server reports its own by `GetInfo`; the rest is read from outside. Knows no faults.
"""

import asyncio
import gc
import threading
import time
from dataclasses import dataclass

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
"""Lease of the servers under test: how long a session outlives the last sign of its client."""

_GRACE_SECONDS = 10.0
"""Beyond a lease: expired sessions are looked for only a few times per lease."""

_RELEASE_SECONDS = 6.0
"""Longest time until a client or server has released what a closed session held."""

_SPARE_DESCRIPTORS = 40
"""A server keeps channels to the servers it has sent states to, and dials new members."""

_SPARE_TASKS = 2 * _SPARE_DESCRIPTORS
"""A channel is read by one task and served by another."""

_SPARE_THREADS = 4


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one server held when it was idle."""

    tokens_free: int
    outbox_bytes_free: int
    num_sessions: int
    num_descriptors: int
    num_tasks: int
    num_threads: int

    def excess(self, first: "Holdings") -> list[str]:
        """What is held beyond ``first``, in words."""
        found = []
        if self.num_sessions > 0:
            found.append(f"{self.num_sessions} sessions")
        if self.tokens_free < first.tokens_free:
            found.append(f"{first.tokens_free - self.tokens_free} tokens of KV cache")
        if self.outbox_bytes_free < first.outbox_bytes_free:
            found.append(f"{first.outbox_bytes_free - self.outbox_bytes_free} bytes of outbox")
        for name, now, before, spare in (
            ("descriptors", self.num_descriptors, first.num_descriptors, _SPARE_DESCRIPTORS),
            ("tasks", self.num_tasks, first.num_tasks, _SPARE_TASKS),
            ("threads", self.num_threads, first.num_threads, _SPARE_THREADS),
        ):
            if now > before + spare:
                found.append(f"{now} {name}, {before} at first")
        return found


class LeakCheck:
    """Compares servers with what they held when they were first seen idle.

    Some are excused until later: a session whose close did not reach its server ends by its lease.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._first: dict[PeerId, Holdings] = {}
        self._excused: dict[PeerId, float] = {}

    def remember(self, manager: RemoteSequenceManager) -> None:
        """Note what servers hold that are new."""
        for server in self._cluster.alive():
            if server.peer_id not in self._first:
                held = holdings(manager, server)
                if held is not None:
                    self._first[server.peer_id] = held

    def excuse(self, server: LocalServer) -> None:
        """The server may hold on to sessions until their lease is over."""
        self._excused[server.peer_id] = time.monotonic() + LEASE_SECONDS + _GRACE_SECONDS

    def leaks(self, manager: RemoteSequenceManager, *, after_leases: bool = False) -> list[str]:
        """What surviving servers still hold, in words.

        Excused ones are looked at only ``after_leases``, whose end is then waited for.
        """
        found = []
        for server in self._cluster.alive():
            first = self._first.get(server.peer_id)
            if first is None:
                continue
            excused_seconds = self._excused.get(server.peer_id, 0.0) - time.monotonic()
            if excused_seconds > 0 and not after_leases:
                continue
            leaks = _await_release(manager, server, first, max(0.0, excused_seconds))
            if leaks:
                found += [f"server {server.blocks} …{server.peer_id[-6:]}: {x}" for x in leaks]
                self.excuse(server)
        return found


def _await_release(
    manager: RemoteSequenceManager, server: LocalServer, first: Holdings, excused_seconds: float
) -> list[str]:
    """What the server still holds at the end of its time, in words; returns once that is none."""
    leaks: list[str] = []

    def is_clean() -> bool:
        now = holdings(manager, server)
        leaks[:] = ["does not answer"] if now is None else now.excess(first)
        return not leaks

    wait_until(is_clean, _RELEASE_SECONDS + excused_seconds, pause=0.2)
    return leaks


def holdings(manager: RemoteSequenceManager, server: LocalServer) -> Holdings | None:
    """What a server holds now; None if it does not answer."""

    async def ask() -> Info:
        view = await manager.access.view()
        async with await view.node.open_channel(server.peer_id, "blocks", 3.0) as channel:
            info, _ = await channel.request(GetInfo(), expect=Info, timeout=3.0)
        return info

    try:
        info = manager.run(ask())
        process = psutil.Process(server.pid)
        return Holdings(
            tokens_free=info.tokens_free,
            outbox_bytes_free=info.outbox_bytes_free,
            num_sessions=info.num_sessions,
            num_descriptors=process.num_fds(),
            num_tasks=info.num_tasks,
            num_threads=process.num_threads(),
        )
    except (PetalsError, psutil.NoSuchProcess):
        return None


@dataclass(frozen=True, slots=True)
class ClientHoldings:
    """What this process, the client's, holds."""

    num_tasks: int
    num_threads: int
    num_descriptors: int
    num_daemons: int

    @classmethod
    def now(cls) -> "ClientHoldings":
        async def count_tasks() -> int:
            return len(asyncio.all_tasks()) - 1

        gc.collect()
        me = psutil.Process()
        return cls(
            client_loop.run(count_tasks()),
            threading.active_count(),
            me.num_fds(),
            len(daemons(me.pid)),
        )


def client_leaks(before: ClientHoldings) -> list[str]:
    """What this process holds beyond ``before`` once it has had time to release it, in words."""
    found: list[str] = []

    def is_clean() -> bool:
        now = ClientHoldings.now()
        pairs = {
            "tasks": (before.num_tasks, now.num_tasks),
            "threads": (before.num_threads + 1, now.num_threads),
            "descriptors": (before.num_descriptors + 4, now.num_descriptors),
            "network daemons": (before.num_daemons, now.num_daemons),
        }
        found[:] = [f"client: {b} {name}, {a} before" for name, (a, b) in pairs.items() if b > a]
        return not found

    wait_until(is_clean, _RELEASE_SECONDS, pause=0.1)
    return found
