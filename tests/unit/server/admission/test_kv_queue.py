"""Who gets KV memory when, and what a request that ends early leaves behind."""

import asyncio
from collections.abc import Callable

import pytest

from petals.errors import CacheFull, RequestTooLarge
from petals.models.runtime.kv_layout import BlockLayout, KVLayout
from petals.server.admission.kv_queue import CacheRequest, KVQueue
from petals.server.compute.kv_pool import KVPool
from petals.testing.manual_clock import ManualClock, settle
from petals.types import BlockSpan

SPAN = BlockSpan(0, 1)
LAYOUT = KVLayout(span=SPAN, blocks=(BlockLayout(key_shape=(1, 1), value_shape=(1, 1)),))


class Inline:
    """An executor whose thread is never busy."""

    def post(self, function: Callable[[], object]) -> None:
        function()


class Rig:
    """A queue for a pool of ten rows of 16 tokens."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pool = KVPool.for_tokens(LAYOUT, 10 * 16)
        self.queue = KVQueue(self.pool, Inline(), self.clock)

    def ask(self, num_rows: int, timeout_seconds: float = 60.0) -> "asyncio.Task":
        request = CacheRequest(num_rows, 16, SPAN)
        return asyncio.create_task(self.queue.reserve(request, timeout_seconds))


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_free_memory_is_granted_at_once(rig: Rig) -> None:
    kv = await rig.ask(10, timeout_seconds=0.0)
    assert rig.pool.block_tokens_free == 0
    rig.queue.release(kv)
    assert rig.pool.reserved_bytes == len(rig.queue) == 0


async def test_requests_are_served_in_order_and_none_overtakes(rig: Rig) -> None:
    first = await rig.ask(8)
    big, small, other = (rig.ask(num_rows) for num_rows in (9, 1, 1))
    await settle()
    assert len(rig.queue) == 3
    with pytest.raises(CacheFull, match="Other requests wait"):
        await rig.ask(1, timeout_seconds=0.0)
    rig.queue.release(first)
    await settle()
    assert [task.done() for task in (big, small, other)] == [True, True, False]
    rig.queue.release(await big)
    assert (await other).reserved_bytes > 0


async def test_a_request_larger_than_the_pool_does_not_wait(rig: Rig) -> None:
    await rig.ask(10)
    rig.ask(1)
    await settle()
    with pytest.raises(RequestTooLarge):
        await rig.ask(11)


async def test_a_timeout_ends_the_wait_and_lets_the_next_in(rig: Rig) -> None:
    await rig.ask(8)
    big, small = rig.ask(5, timeout_seconds=2.0), rig.ask(2)
    await settle()
    await rig.clock.advance(1.9)
    assert not big.done() and not small.done()
    await rig.clock.advance(0.2)
    with pytest.raises(CacheFull, match="within 2 s"):
        await big
    assert (await small).reserved_bytes > 0


@pytest.mark.parametrize("is_granted", [False, True])
async def test_a_cancelled_request_keeps_nothing(rig: Rig, is_granted: bool) -> None:
    first = await rig.ask(10)
    waiting, behind = rig.ask(10), rig.ask(3)
    await settle()
    if is_granted:
        rig.queue.release(first)
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    if not is_granted:
        rig.queue.release(first)
    rig.queue.release(await behind)
    assert rig.pool.reserved_bytes == len(rig.queue) == 0
