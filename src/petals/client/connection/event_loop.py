"""The event loop of all synchronous callers of this process, in a thread of its own.

One step of a session is one coroutine, so that a caller changes threads once per step. Any number
of threads may call at the same time. Knows nothing of what it runs.
"""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from petals.errors import PeerTimeout, SwarmError
from petals.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

_CANCEL_SECONDS = 5.0
"""Most time (s) that a caller waits for its cancelled work to end."""

_CLOSE_SECONDS = 10.0
"""Most time (s) that ``close`` waits for the closers, and then for the thread."""


class _LoopCall(Generic[T]):
    """One call: made in the caller's thread, run as a task of the loop.

    The caller waits on a lock, which costs less than a concurrent future and its condition
    variable.
    """

    __slots__ = ("_ended", "_task", "_work")

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Lock()
        self._ended.acquire()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work)
        self._task.add_done_callback(self._end)

    def wait(self, timeout: float | None) -> bool:
        """True once the work has ended, False after ``timeout`` seconds."""
        return self._ended.acquire(timeout=-1 if timeout is None else timeout)

    def cancel(self) -> None:
        """Cancel the work; called in the loop."""
        if self._task is not None:
            self._task.cancel()
        else:  # the caller was interrupted before ``start`` was scheduled
            self._work.close()
            self._ended.release()

    def result(self) -> T:
        assert self._task is not None
        if self._task.cancelled():
            raise SwarmError("The client was shut down while this call waited.")
        return self._task.result()

    def _end(self, task: "asyncio.Task[T]") -> None:
        self._ended.release()


class EventLoopThread:
    """A thread that runs an event loop; it starts at the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._launched: set[asyncio.Task[object]] = set()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run ``work`` in the loop and return its result, or raise what it raises.

        After ``timeout`` (s) the work is cancelled and PeerTimeout raised. An interrupt (Ctrl-C)
        cancels it, too, and is raised after the work has ended. Raises RuntimeError in the loop's
        own thread, SwarmError if the thread is closed meanwhile.
        """
        loop = self.loop
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("This call waits for the event loop it was made in: await instead.")
        call = _LoopCall(work)
        try:
            loop.call_soon_threadsafe(call.start)
            ended = call.wait(timeout)
        except BaseException:
            self._cancel(loop, call)
            raise
        if not ended:
            self._cancel(loop, call)
            raise PeerTimeout(f"No result within {timeout:g} s.")
        return call.result()

    @property
    def is_running(self) -> bool:
        """True between the first call and ``close``."""
        return self._loop is not None and self._process == os.getpid()

    def start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run ``work()`` in the loop without waiting for it; for clean-up, from any thread.

        Does nothing if the loop does not run.
        """
        loop = self._loop
        if loop is not None and self.is_running:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._launch, work)

    def _launch(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._launched.add(task)
        task.add_done_callback(self._launched.discard)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started if needed; a forked child process starts its own."""
        loop = self._loop
        if loop is not None and self._process == os.getpid():
            return loop
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop = self._start()
            return self._loop

    def at_exit(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Await ``closer`` in the loop before the interpreter exits, in reverse order."""
        self._closers.append(closer)

    def forget(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Undo ``at_exit``; no error if the closer is not registered."""
        with contextlib.suppress(ValueError):
            self._closers.remove(closer)

    def close(self) -> None:
        """Run the closers, cancel the other tasks, end the thread; a later call restarts it."""
        with self._lock:
            loop, thread = self._loop, self._thread
            closers, self._closers = self._closers, []
            self._loop = self._thread = None
        if loop is None or thread is None or self._process != os.getpid():
            return
        call = _LoopCall(_close_all(closers))
        loop.call_soon_threadsafe(call.start)
        call.wait(_CLOSE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_SECONDS)

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        if self._process != os.getpid() and self._process:
            self._closers = []  # they belong to the parent process's loop
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=_serve, args=(loop,), name="petals-client", daemon=True
        )
        self._thread.start()
        atexit.unregister(self.close)
        atexit.register(self.close)
        return loop

    @staticmethod
    def _cancel(loop: asyncio.AbstractEventLoop, call: _LoopCall[Any]) -> None:
        """Cancel and wait, so that the work has ended before its caller uses the same objects."""
        loop.call_soon_threadsafe(call.cancel)
        call.wait(_CANCEL_SECONDS)


async def _close_all(closers: list[Callable[[], Awaitable[None]]]) -> None:
    for closer in reversed(closers):
        (error,) = await asyncio.gather(closer(), return_exceptions=True)
        if error is not None:
            logger.warning("could not close cleanly: %r", error)
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_CANCEL_SECONDS)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


client_loop = EventLoopThread()
"""The only one of the process."""
