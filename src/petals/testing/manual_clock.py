"""A clock that stands still until a test moves it.

Implements ``petals.clock.Clock``. ``advance`` calls every timer that comes due, in order, and lets
the event loop run between them. Must not know what waits for the clock.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable

_SETTLE_ROUNDS = 50
"""Rounds of the event loop after which a chain of ready tasks counts as finished."""


class ManualTimer:
    """A callback that is called when the clock reaches its time."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Time that moves only by ``advance``; wall clock and monotonic clock move together.

    ``start_seconds``: the wall clock's first value, in seconds since 1970.
    """

    def __init__(self, start_seconds: float = 1_700_000_000.0) -> None:
        self._elapsed = 0.0
        self._start = start_seconds
        self._order = itertools.count()
        self._timers: list[tuple[float, int, ManualTimer]] = []

    def now(self) -> float:
        return self._start + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    def call_later(self, delay_seconds: float, callback: Callable[[], object]) -> ManualTimer:
        timer = ManualTimer(callback)
        heapq.heappush(self._timers, (self._elapsed + delay_seconds, next(self._order), timer))
        return timer

    async def sleep(self, seconds: float) -> None:
        over = asyncio.Event()
        self.call_later(seconds, over.set)
        await over.wait()

    async def advance(self, seconds: float) -> None:
        """Move the clock ``seconds`` forward and call every timer that comes due on the way."""
        target = self._elapsed + seconds
        await settle()
        while self._timers and self._timers[0][0] <= target:
            due, _, timer = heapq.heappop(self._timers)
            self._elapsed = max(self._elapsed, due)
            if timer.callback is not None:
                timer.callback()
                await settle()
        self._elapsed = target
        await settle()


async def settle() -> None:
    """Let every task run that can: ``_SETTLE_ROUNDS`` rounds of the event loop."""
    for _ in range(_SETTLE_ROUNDS):
        await asyncio.sleep(0)
