"""An event loop in virtual time: while no task can run, the clock jumps to the next timer.

Nothing sleeps for real, so minutes of waiting take milliseconds, and equal runs take equal turns.
Knows nothing of what runs in it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from petals.clock import SystemClock

T = TypeVar("T")

_START_SECONDS = 1000.0
"""Virtual time at which a loop begins; not 0, since some times are differences from 0."""

_MAX_TURNS_AT_ONCE = 20_000
_MAX_TURNS = 300_000
_MAX_SECONDS = 3600.0
"""Turns of the loop at one moment of virtual time, turns in all, and virtual seconds, after which
the work counts as stuck. The first limit finds a busy loop, the others a loop that waits for ever.
"""

_MAX_LAST_TURNS = 1000
"""Turns in which the tasks of stuck work may end once they have been cancelled."""

_MIN_DELAY_SECONDS = 1e-6
"""A shorter one would round to nothing, and a loop that waits for a deadline would never reach it.
"""

_WALL_CLOCK_OFFSET_SECONDS = 1.7e9


class Stuck(AssertionError):
    """The work does not come to an end."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Run it with ``run_virtually``. It has no sockets, no threads and no signals."""

    def __init__(self) -> None:
        super().__init__()
        self._now = _START_SECONDS
        self._ends_at = _START_SECONDS + _MAX_SECONDS
        self._turns_left = _MAX_TURNS
        self._turns_left_now = _MAX_TURNS_AT_ONCE
        # The base class waits by asking a selector for events; here waiting moves the clock.
        self._selector = self

    def time(self) -> float:
        return self._now

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """As everywhere, but however short the delay is, time passes."""
        return super().call_later(max(delay, _MIN_DELAY_SECONDS), callback, *args, context=context)

    def select(self, timeout: float | None) -> list[Any]:
        """Wait for ``timeout`` seconds (None: for ever) of virtual time. Raises Stuck."""
        self._turns_left -= 1
        self._turns_left_now -= 1
        if timeout:
            self._now += timeout
            self._turns_left_now = _MAX_TURNS_AT_ONCE
        is_over = self._now > self._ends_at or not (self._turns_left and self._turns_left_now)
        if timeout is None or is_over:
            seconds = self._now - _START_SECONDS
            self._turns_left = self._turns_left_now = _MAX_LAST_TURNS
            self._ends_at = self._now + _MAX_SECONDS
            raise Stuck(f"not at its end after {seconds:.3f} s: {self._running()}")
        return []

    def _running(self) -> str:
        """Where the tasks stand."""
        stacks = [task.get_stack(limit=1) for task in asyncio.all_tasks(self)]
        frames = [frame for stack in stacks for frame in stack]
        return ", ".join(f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in frames)

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody waits in another thread."""


class VirtualClock(SystemClock):
    """The clocks of a VirtualTimeLoop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return _WALL_CLOCK_OFFSET_SECONDS + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()


def run_virtually(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``work`` in a loop of its own, to its end."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work())
