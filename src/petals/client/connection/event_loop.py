"""The one event loop of all synchronous callers in this process, in a thread of its own.

A call crosses once: the whole of a session's step is one coroutine. Any number of user threads may
call at the same time. Knows nothing of what it runs.
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
"""How long an interrupted call may take to put things in order."""

_CLOSE_SECONDS = 10.0


class _LoopCall(Generic[T]):
    """One crossing: made by the caller, started in the loop, awaited by the caller on a lock."""

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
        """In the loop."""
        if self._task is not None:
            self._task.cancel()
        else:  # interrupted before it was even handed over
            self._work.close()
            self._ended.release()

    def result(self) -> T:
        assert self._task is not None
        if self._task.cancelled():
            raise SwarmError("The client was shut down while this call waited.")
        return self._task.result()

    def _end(self, task: "asyncio.Task[T]") -> None:
        self._ended.release()


class Bridge:
    """A thread with an event loop, and the way into it. Starts at the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._launched: set[asyncio.Task[object]] = set()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run ``work`` in the loop and return its result, or raise what it raises.

        After ``timeout`` seconds it is cancelled and PeerTimeout raised. An interrupt (Ctrl-C)
        cancels it too, and is raised once it has ended. Raises RuntimeError inside the loop itself,
        and SwarmError when the bridge is closed meanwhile.
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
        """Run ``work()`` in the loop and wait for nothing; for cleaning up, from any thread."""
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
        """The running loop; a forked child gets one of its own."""
        loop = self._loop
        if loop is not None and self._process == os.getpid():
            return loop
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop = self._start()
            return self._loop

    def at_exit(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Await ``closer`` in the loop before the interpreter ends, the last registered first."""
        self._closers.append(closer)

    def forget(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Take back an ``at_exit``; nothing happens if it was none."""
        with contextlib.suppress(ValueError):
            self._closers.remove(closer)

    def close(self) -> None:
        """Run the closers, cancel what still runs and end the thread. A later call starts anew."""
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
            self._closers = []  # they belong to the parent's loop
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
        """Let the work end before its caller goes on and uses the same objects."""
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


bridge = Bridge()
"""The process's only one; it starts at its first call."""
