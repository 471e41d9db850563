"""The queue for KV memory: first come, first served.

A request that can never fit is refused at once; another waits as long as its client allows. No
request overtakes one that waits, even if it would fit: small requests would starve a large one.
Knows no sessions and no network.
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
    """Rows of up to ``max_length`` tokens in ``blocks``."""

    num_rows: int
    max_length: int
    blocks: BlockSpan


class KVQueue:
    """Reserves memory of a pool. Runs on the event loop: booking needs no compute thread."""

    def __init__(self, pool: KVPool, executor: Executor, clock: Clock) -> None:
        self._pool = pool
        self._executor = executor
        self._clock = clock
        self._waiting: deque[tuple[CacheRequest, asyncio.Future[SessionKV]]] = deque()

    def __len__(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    async def reserve(self, request: CacheRequest, timeout_seconds: float) -> SessionKV:
        """Reserve memory; wait for it for at most ``timeout_seconds``.

        Raises RequestTooLarge at once, CacheFull after the timeout.
        """
        self._pool.check_fits(request.num_rows, request.max_length, request.blocks)
        if not self._waiting:
            try:
                return self._take(request)
            except CacheFull:
                if timeout_seconds <= 0:
                    raise
        if timeout_seconds <= 0:
            raise _still_full("Other requests wait for cache already.")
        return await self._wait(request, timeout_seconds)

    def release(self, kv: SessionKV) -> None:
        """Return memory and grant it to the requests that wait; free it between two batches."""
        self._pool.release(kv)
        self._executor.post(kv.free)
        self._grant()

    async def _wait(self, request: CacheRequest, timeout_seconds: float) -> SessionKV:
        granted: asyncio.Future[SessionKV] = asyncio.get_running_loop().create_future()

        def give_up() -> None:
            if not granted.done():
                message = f"No cache became free within {timeout_seconds:g} s."
                granted.set_exception(_still_full(message))

        entry = (request, granted)
        self._waiting.append(entry)
        timer = self._clock.call_later(timeout_seconds, give_up)
        try:
            return await granted
        except asyncio.CancelledError:
            # Cancelled between the grant and the task's next run: no session will own the memory.
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(granted.result())
            raise
        finally:
            timer.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._grant()

    def _grant(self) -> None:
        """Give the requests at the head of the queue what they ask for, as far as it is free."""
        while self._waiting:
            request, granted = self._waiting[0]
            if not granted.done():
                try:
                    granted.set_result(self._take(request))
                except CacheFull:
                    return
            self._waiting.popleft()

    def _take(self, request: CacheRequest) -> SessionKV:
        return self._pool.reserve(request.num_rows, request.max_length, request.blocks)


def _still_full(message: str) -> CacheFull:
    return CacheFull(message, hint="Wait longer (alloc_timeout), or use another server.")
