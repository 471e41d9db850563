"""Time as an argument, so that tests can set it.

``now`` is the wall clock (record expiry, tickets; comparable between machines), ``monotonic``
measures durations inside one process. Must not know network and torch.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol


class Timer(Protocol):
    """A callback that is scheduled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Where a component gets its time from."""

    def now(self) -> float:
        """Wall clock, seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow; meaningful as differences."""
        ...

    def call_later(self, delay_seconds: float, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` in the running event loop after ``delay_seconds``."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds``."""
        ...


class SystemClock:
    """The machine's clocks and the running event loop's timers."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)

    def call_later(self, delay_seconds: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_seconds, callback)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@asynccontextmanager
async def time_limit(clock: Clock, seconds: float) -> AsyncIterator[None]:
    """``asyncio.timeout`` by ``clock``: cancels what runs inside after ``seconds`` and raises
    TimeoutError.
    """
    async with asyncio.timeout(None) as limit:
        timer = clock.call_later(seconds, lambda: limit.reschedule(0.0))
        try:
            yield
        finally:
            timer.cancel()
