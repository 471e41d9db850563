"""Waiting for KV memory, in order of arrival.

A request that can never fit is refused at once; one that fits later waits as long as it said it
would. Nobody overtakes, so that a large request is not starved by small ones. Knows no sessions and
no network.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from petals.clock import Clock
from petals.errors import CacheFull
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import KVPool, SessionKV
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """What is asked for: rows of up to ``max_length`` tokens in ``blocks``."""

    num_rows: int
    max_length: int
    blocks: BlockSpan


class Reservations:
    """The line in front of a pool. The pool itself is touched on the compute thread only."""

    def __init__(self, pool: KVPool, executor: Executor, clock: Clock) -> None:
        self._pool = pool
        self._executor = executor
        self._clock = clock
        self._line: deque[asyncio.Event] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line)

    async def reserve(self, room: CacheRequest, timeout_seconds: float) -> SessionKV:
        """Room in the pool, as soon as there is some and it is our turn.

        Raises RequestTooLarge at once, CacheFull after ``timeout_seconds``.
        """
        try:
            return await self._take(room, may_keep=not self._line)
        except CacheFull:
            if timeout_seconds <= 0:
                raise
        return await self._wait(room, timeout_seconds)

    def release(self, kv: SessionKV) -> None:
        """Free memory between two batches, then wake who waits first."""
        loop = asyncio.get_running_loop()

        def free() -> None:
            kv.free()
            loop.call_soon_threadsafe(self._wake_first)

        self._executor.post(free)

    async def _wait(self, room: CacheRequest, timeout_seconds: float) -> SessionKV:
        deadline = self._clock.monotonic() + timeout_seconds
        turn = asyncio.Event()
        # Memory may have come free while we were not in line yet: begin with a try.
        turn.set()
        self._line.append(turn)
        timer = self._clock.call_later(timeout_seconds, turn.set)
        try:
            while True:
                await turn.wait()
                turn.clear()
                try:
                    return await self._take(room, may_keep=self._line[0] is turn)
                except CacheFull:
                    if self._clock.monotonic() >= deadline:
                        raise
        finally:
            timer.cancel()
            self._line.remove(turn)
            self._wake_first()

    async def _take(self, room: CacheRequest, may_keep: bool) -> SessionKV:
        taking = asyncio.ensure_future(self._executor.call(lambda: self._try(room, may_keep)))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            # Whoever asked is gone, the memory may be granted all the same.
            taking.add_done_callback(self._return)
            raise

    def _try(self, room: CacheRequest, may_keep: bool) -> SessionKV:
        kv = self._pool.reserve(room.num_rows, room.max_length, room.blocks)
        if not may_keep:
            kv.free()
            raise CacheFull(
                "Others are waiting for cache already.",
                hint="Wait in line (alloc_timeout), or use another server.",
            )
        return kv

    def _return(self, taking: "asyncio.Future[SessionKV]") -> None:
        if not taking.cancelled() and taking.exception() is None:
            self.release(taking.result())

    def _wake_first(self) -> None:
        if self._line:
            self._line[0].set()
