"""The event loop of all synchronous callers of this process, in a thread of its own.

One step of a session is one coroutine, so that a caller changes threads once per step. Any number
of threads may call at the same time. Knows nothing of what it runs.

*Exit.* The loop is closed by ``atexit``, before the interpreter is finalized, and is not started
again: a thread that starts during finalization never runs, and its starter would wait for ever.
What is cleaned up later (``finish``) has been closed with the loop.

*Fork.* A child process has none of its parent's threads, but its sockets and its epoll set, which
is shared with the parent. The child replaces these and starts a loop of its own at its first call.
"""

import asyncio
import atexit
import contextlib
import ctypes
import os
import selectors
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

from petals.errors import PeerTimeout, SwarmError
from petals.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

_CANCEL_SECONDS = 5.0
"""Most time (s) that a caller waits for its cancelled work to end."""

_CLOSE_SECONDS = 6.0
"""Most time (s) that ``close`` waits for the closers, and then for the thread."""

_WORKER_EXIT_PRIORITY = 100
"""Order among the finalizers of a `multiprocessing` worker; the highest runs first."""


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
        self._selector: selectors.BaseSelector | None = None
        self._thread: threading.Thread | None = None
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._launched: set[asyncio.Task[object]] = set()
        self._is_exiting = False
        self._is_registered = False

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run ``work`` in the loop and return its result, or raise what it raises.

        After ``timeout`` (s) the work is cancelled and PeerTimeout raised. An interrupt (Ctrl-C)
        cancels it, too, and is raised after the work has ended. Raises RuntimeError in the loop's
        own thread, SwarmError if the thread is closed meanwhile or the interpreter exits.
        """
        try:
            self._end_with_the_interpreter()
            loop = self.loop
            if threading.current_thread() is self._thread:
                raise RuntimeError("This call waits for the event loop it runs in: await instead.")
        except BaseException:
            work.close()
            raise
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
        self._end_with_the_interpreter()
        return call.result()

    @property
    def is_running(self) -> bool:
        """True between the first call in this process and ``close``."""
        return self._loop is not None

    def finish(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run clean-up ``work()`` and wait for it.

        Does nothing if the loop does not run: closing it has closed what it had open.
        """
        if threading.current_thread() is self._thread:  # a garbage collection in the loop
            self.start(work)
        elif self.is_running:
            self.run(work())

    def start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """``finish`` without waiting, from any thread."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._launch, work)

    def _launch(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._launched.add(task)
        task.add_done_callback(self._launched.discard)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started if needed. Raises SwarmError while the interpreter exits."""
        loop = self._loop
        if loop is not None:
            return loop
        with self._lock:
            if self._loop is None:
                self._loop = self._start()
            return self._loop

    def at_exit(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Await ``closer`` in the loop before the interpreter exits, beside the other closers.

        A forked child awaits it as well, in its own loop.
        """
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
            self._loop = self._thread = self._selector = None
        if loop is None or thread is None:
            return
        call = _LoopCall(_close_all(closers))
        loop.call_soon_threadsafe(call.start)
        call.wait(_CLOSE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_SECONDS)

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._is_exiting or sys.is_finalizing():
            raise SwarmError(
                "The interpreter is exiting: the connections to the swarm are closed.",
                hint="Generate before the script ends, or in a `with` block.",
            )
        self._selector = selectors.DefaultSelector()
        loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(
            target=_serve, args=(loop,), name="petals-client", daemon=True
        )
        self._thread.start()
        if not self._is_registered:
            self._is_registered = True
            os.register_at_fork(after_in_child=self._begin_anew)
            atexit.register(self._exit)
        # Workers of `multiprocessing` end without `atexit`; each one begins with no finalizers.
        Finalize(None, self._exit, exitpriority=_WORKER_EXIT_PRIORITY)
        return loop

    def _exit(self) -> None:
        self._is_exiting = True
        self.close()

    def _end_with_the_interpreter(self) -> None:
        """A daemon thread that calls while the interpreter exits waits for the end of the process,
        as it would at its next line of Python; an error would only print a traceback.
        """
        if self._is_exiting and threading.current_thread().daemon:
            threading.Event().wait()

    def _begin_anew(self) -> None:
        """In a child process, right after the fork: leave everything to the parent.

        File descriptors first. The parent's sockets must end when the parent closes them, and what
        Python's objects do with them while they are collected must not change the parent's epoll
        set. The numbers stay in use, so that those objects close no file of the child. (A socket
        that is not read at the moment of the fork is not in the set; it stays open in the child.)

        The loop and its tasks are never collected: their ``finally`` blocks are the parent's work,
        and asyncio would report every task as pending.
        """
        loop, selector = self._loop, self._selector
        self._lock = threading.Lock()
        self._loop = self._thread = self._selector = None
        self._launched = set()
        self._is_exiting = False
        if loop is None or selector is None:
            return
        null = os.open(os.devnull, os.O_RDWR)
        for key in list(selector.get_map().values()):
            os.dup2(null, key.fd, inheritable=False)
        os.dup2(null, selector.fileno(), inheritable=False)  # type: ignore[attr-defined]
        os.close(null)
        for inherited in (loop, *asyncio.all_tasks(loop)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))

    @staticmethod
    def _cancel(loop: asyncio.AbstractEventLoop, call: _LoopCall[Any]) -> None:
        """Cancel and wait, so that the work has ended before its caller uses the same objects."""
        loop.call_soon_threadsafe(call.cancel)
        call.wait(_CANCEL_SECONDS)


async def _close_all(closers: list[Callable[[], Awaitable[None]]]) -> None:
    # All at the same time: each may have to wait for servers that do not answer.
    ended = await asyncio.gather(*(close() for close in closers), return_exceptions=True)
    for error in ended:
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
