"""Tasks that outlive their caller, and coroutines that run at the same time.

``BackgroundTasks`` keeps its tasks alive, logs the exceptions that end them, and cancels them all
when it is closed. It is one of the few places that catch every exception, since no caller can. Must
not know what it runs.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from petals.errors import PetalsError
from petals.logs import get_logger

logger = get_logger(__name__)
T = TypeVar("T")


class BackgroundTasks:
    """Starts tasks and ends them. Use it as an async context manager, or ``close`` it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Number of tasks that run."""
        return len(self._tasks)

    async def __aenter__(self) -> "BackgroundTasks":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def start(self, work: Coroutine[Any, Any, object], name: str) -> "asyncio.Task[None]":
        """Run ``work`` in a task of its own; an exception is logged, not raised."""
        task = asyncio.create_task(_guard(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step leaves its coroutine unclosed, and Python
        # warns of that.
        task.add_done_callback(lambda _: work.close())
        return task

    async def wait(self, timeout_seconds: float) -> None:
        """Wait until all tasks have ended, for at most ``timeout_seconds``."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def run_until(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Run ``work`` until it ends or ``event`` is set, which cancels it.

    Returns its result, or None if it was cancelled; raises its error.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.wait({working, waiting})


async def _guard(work: Coroutine[Any, Any, object], name: str) -> None:
    try:
        await work
    except PetalsError as error:
        logger.warning("%s ended: %s", name, error)
    except Exception:
        logger.exception("%s failed", name)


async def gather_bounded(works: Iterable[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """The results of all ``works``, in their order; at most ``limit`` run at the same time.

    Raises the first failure; the works that still run are then cancelled and waited for.
    """
    gate = asyncio.Semaphore(limit)

    async def run(work: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await work()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(work)) for work in works]
    except BaseExceptionGroup as failures:
        # Callers handle one typed error; the others are of works that ended because of the first.
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]
