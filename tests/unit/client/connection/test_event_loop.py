import asyncio
import gc
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from petals.client.connection.event_loop import EventLoopThread
from petals.errors import BadInput, PeerTimeout, SwarmError


@pytest.fixture
def loop_thread() -> Iterator[EventLoopThread]:
    loop_thread = EventLoopThread()
    yield loop_thread
    loop_thread.close()


async def echo(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_results_and_errors_come_back(loop_thread: EventLoopThread) -> None:
    async def fail() -> None:
        raise BadInput("no")

    assert loop_thread.run(echo(3)) == 3
    with pytest.raises(BadInput):
        loop_thread.run(fail())


def test_many_threads_share_one_loop(loop_thread: EventLoopThread) -> None:
    async def where(value: int) -> tuple[int, int]:
        return await echo(value), threading.get_ident()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda value: loop_thread.run(where(value)), range(200)))
    assert [value for value, _ in results] == list(range(200))
    assert len({thread for _, thread in results}) == 1


def test_timeout_cancels_the_work(loop_thread: EventLoopThread) -> None:
    ended: list[bool] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(PeerTimeout):
        loop_thread.run(forever(), timeout=0.01)
    assert ended == [True]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_cancels_the_work_and_waits_for_its_end(loop_thread: EventLoopThread) -> None:
    ended: list[bool] = []

    async def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        loop_thread.run(interrupted())
    assert ended == [True]
    assert loop_thread.run(echo(1)) == 1


def test_interrupt_before_the_work_is_handed_over(
    loop_thread: EventLoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = loop_thread.loop.call_soon_threadsafe
    orders: list[object] = []

    def interrupted_once(*order: object) -> None:
        orders.append(order)
        if len(orders) == 1:
            raise KeyboardInterrupt
        hand_over(*order)

    monkeypatch.setattr(loop_thread.loop, "call_soon_threadsafe", interrupted_once)
    work = echo(1)
    with pytest.raises(KeyboardInterrupt):
        loop_thread.run(work)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_waiting_for_oneself_is_refused(loop_thread: EventLoopThread) -> None:
    async def inside() -> None:
        loop_thread.run(echo(1))

    with pytest.raises(RuntimeError, match="await instead"):
        loop_thread.run(inside())


def test_close_runs_the_closers_and_frees_the_waiting(loop_thread: EventLoopThread) -> None:
    closed: list[int] = []
    started = threading.Event()

    async def close(number: int) -> None:
        closed.append(number)

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    loop_thread.run(echo(0))
    loop_thread.at_exit(lambda: close(1))
    loop_thread.at_exit(lambda: close(2))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: loop_thread.run(wait()))
        started.wait(5)
        loop_thread.close()
        with pytest.raises(SwarmError, match="shut down"):
            waiting.result(5)
    assert sorted(closed) == [1, 2]
    assert loop_thread.run(echo(5)) == 5


def test_nothing_hangs_at_exit() -> None:
    program = (
        "import asyncio\n"
        "from petals.client.connection.event_loop import client_loop\n"
        "async def start():\n"
        "    client_loop.task = asyncio.create_task(asyncio.sleep(1000))\n"
        "async def say(): print('closed')\n"
        "client_loop.run(start()); client_loop.at_exit(say)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "closed\n"
    assert done.stderr == ""


def test_clean_up_after_the_end_starts_no_thread(loop_thread: EventLoopThread) -> None:
    done: list[int] = []

    async def clean_up() -> None:
        done.append(1)

    loop_thread.finish(clean_up)
    assert not loop_thread.is_running and not done
    loop_thread.run(echo(1))
    loop_thread.finish(clean_up)
    loop_thread.close()
    loop_thread.finish(clean_up)
    assert not loop_thread.is_running and done == [1]


def test_clean_up_in_the_loop_does_not_wait_for_itself(loop_thread: EventLoopThread) -> None:
    """As a garbage collection in the loop's thread may do it."""
    done = asyncio.Event()

    async def clean_up() -> None:
        done.set()

    async def inside() -> None:
        loop_thread.finish(clean_up)
        await done.wait()

    loop_thread.run(inside(), timeout=10.0)


def test_calls_while_the_interpreter_exits_are_refused() -> None:
    program = (
        "import atexit, asyncio\n"
        "from petals.errors import SwarmError\n"
        "from petals.client.connection.event_loop import client_loop\n"
        "async def nothing(): pass\n"
        "def late():\n"
        "    try:\n"
        "        client_loop.run(nothing())\n"
        "    except SwarmError as error:\n"
        "        print(error.message)\n"
        "class Late:\n"
        "    def __del__(self): late()\n"
        "atexit.register(late)\n"
        "client_loop.run(nothing())\n"
        "kept = Late()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    (during, after) = done.stdout.splitlines()
    assert during == after and "exiting" in during
    assert done.stderr == ""


def in_child(work: Callable[[], int]) -> int:
    """The exit status of a forked child that ends with the result of ``work``."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_has_a_loop_of_its_own(loop_thread: EventLoopThread) -> None:
    assert loop_thread.run(echo(1)) == 1
    assert in_child(lambda: loop_thread.run(echo(7))) == 7
    assert loop_thread.run(echo(1)) == 1


def test_a_forked_child_runs_the_closers_for_itself(loop_thread: EventLoopThread) -> None:
    closed: list[int] = []

    async def close() -> None:
        closed.append(os.getpid())

    loop_thread.at_exit(close)
    loop_thread.run(echo(1))

    def child() -> int:
        loop_thread.run(echo(1))
        loop_thread.close()
        return len(closed)

    assert in_child(child) == 1
    assert closed == []


def test_a_child_that_collects_its_parents_streams_does_no_harm(
    loop_thread: EventLoopThread,
) -> None:
    """They share the parent's epoll set; closing a writer removes its socket from it."""
    near, far = socket.socketpair()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(sock=near)

    streams = [loop_thread.run(connect())]

    def child() -> int:
        streams[0][1].close()
        streams.clear()
        gc.collect()
        return 0

    assert in_child(child) == 0
    far.sendall(b"still")
    reader, writer = streams[0]
    assert loop_thread.run(reader.readexactly(5), timeout=10.0) == b"still"

    async def close() -> None:
        writer.transport.abort()

    # The child's copy does not keep the connection open.
    kept = os.fork()
    if kept == 0:
        signal.pause()
    try:
        loop_thread.run(close())
        far.settimeout(10.0)
        assert far.recv(1) == b""
    finally:
        os.kill(kept, signal.SIGKILL)
        os.waitpid(kept, 0)
