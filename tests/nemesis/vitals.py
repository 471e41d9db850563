"""What processes hold: sessions, KV tokens, tasks, threads, file descriptors; and whether they let
go.

A server tells of itself by `GetInfo`, the rest is read from outside. Knows no faults.
"""

import asyncio
import gc
import threading
import time
from dataclasses import dataclass

import psutil

from nemesis.arena import Arena, daemons, wait_until
from petals.client.connection.event_loop import client_loop
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import PetalsError
from petals.testing.local_swarm import LocalServer
from petals.types import PeerId
from petals.wire.replies import Info
from petals.wire.requests import GetInfo

SPARE_DESCRIPTORS = 40
"""A server keeps channels to the servers it has handed states to, and dials new members."""

SPARE_TASKS = 2 * SPARE_DESCRIPTORS
"""A channel is read by one task and served by another."""

SPARE_THREADS = 4
LEASE_SECONDS = 60.0
GRACE_SECONDS = 20.0
"""Beyond a lease: reaping happens a few times per lease only."""

_SOON_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one server held when it was idle."""

    tokens_free: int
    num_sessions: int
    num_descriptors: int
    num_tasks: int
    num_threads: int
    outbox_bytes_free: int


class Watch:
    """Compares servers with what they were when first seen idle.

    Some are excused until later: a session whose close could not reach them ends by its lease.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._first: dict[PeerId, Holdings] = {}
        self._excused: dict[PeerId, float] = {}

    def look(self, manager: RemoteSequenceManager) -> None:
        """Remember servers that are new."""
        for server in self._arena.alive():
            if server.peer_id not in self._first:
                held = holdings(manager, server)
                if held is not None:
                    self._first[server.peer_id] = held

    def excuse(self, server: LocalServer) -> None:
        """The server may hold on to sessions until their lease is over."""
        self._excused[server.peer_id] = time.monotonic() + LEASE_SECONDS + GRACE_SECONDS

    def leaks(self, manager: RemoteSequenceManager, *, patiently: bool = False) -> list[str]:
        """What survivors still hold, in words; excused ones only ``patiently``."""
        found = []
        for server in self._arena.alive():
            first = self._first.get(server.peer_id)
            if first is None:
                continue
            excused_until = self._excused.get(server.peer_id, 0.0)
            seconds = _SOON_SECONDS
            if excused_until > time.monotonic():
                if not patiently:
                    continue
                seconds += excused_until - time.monotonic()
            last: list[str] = []

            def is_clean() -> bool:
                last[:] = _excess(first, holdings(manager, server))  # noqa: B023
                return not last  # noqa: B023

            if not wait_until(is_clean, seconds, pause=0.2):
                found += [f"server {server.blocks} …{server.peer_id[-6:]}: {what}" for what in last]
                self.excuse(server)
        return found


def _excess(first: Holdings, now: Holdings | None) -> list[str]:
    if now is None:
        return ["does not answer"]
    found = []
    if now.num_sessions > 0:
        found.append(f"{now.num_sessions} sessions")
    if now.tokens_free < first.tokens_free:
        found.append(f"{first.tokens_free - now.tokens_free} tokens of KV cache")
    if now.outbox_bytes_free < first.outbox_bytes_free:
        found.append(f"{first.outbox_bytes_free - now.outbox_bytes_free} bytes of outbox")
    if now.num_descriptors > first.num_descriptors + SPARE_DESCRIPTORS:
        found.append(f"{now.num_descriptors} descriptors, {first.num_descriptors} at first")
    if now.num_tasks > first.num_tasks + SPARE_TASKS:
        found.append(f"{now.num_tasks} tasks, {first.num_tasks} at first")
    if now.num_threads > first.num_threads + SPARE_THREADS:
        found.append(f"{now.num_threads} threads, {first.num_threads} at first")
    return found


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
            num_sessions=info.num_sessions,
            num_descriptors=process.num_fds(),
            num_tasks=info.num_tasks,
            num_threads=process.num_threads(),
            outbox_bytes_free=info.outbox_bytes_free,
        )
    except (PetalsError, psutil.NoSuchProcess):
        return None


@dataclass(frozen=True, slots=True)
class OwnHoldings:
    """What this process, the client's, holds."""

    num_tasks: int
    num_threads: int
    num_descriptors: int
    num_daemons: int

    @classmethod
    def now(cls) -> "OwnHoldings":
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


def own_leaks(before: OwnHoldings) -> list[str]:
    """What this process holds more than ``before``, once it had a moment to let go."""
    found: list[str] = []

    def is_clean() -> bool:
        now = OwnHoldings.now()
        pairs = {
            "tasks": (before.num_tasks, now.num_tasks),
            "threads": (before.num_threads + 1, now.num_threads),
            "descriptors": (before.num_descriptors + 4, now.num_descriptors),
            "network daemons": (before.num_daemons, now.num_daemons),
        }
        found[:] = [f"client: {b} {name}, {a} before" for name, (a, b) in pairs.items() if b > a]
        return not found

    wait_until(is_clean, _SOON_SECONDS, pause=0.1)
    return found
