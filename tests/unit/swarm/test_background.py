"""Tasks beside the main flow: which of two ends first, and what becomes of the other."""

import asyncio

import pytest

from petals.swarm.background import run_until


async def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await run_until(asyncio.Event(), work()) == 7
    assert len(asyncio.all_tasks()) == 1


async def test_an_event_that_comes_first_cancels_the_work() -> None:
    event, cleaned = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        event.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    assert await run_until(event, work()) is None
    assert cleaned.is_set() and len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_until(asyncio.Event(), work())


async def test_a_cancelled_caller_cancels_the_work() -> None:
    work = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_until(asyncio.Event(), work))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled() and work.cancelled()
