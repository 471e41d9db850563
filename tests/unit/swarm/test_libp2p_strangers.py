"""Searches in the directory do not wait for members that have never answered."""

import asyncio
from types import SimpleNamespace

import pytest

from petals.clock import SystemClock
from petals.swarm import libp2p_records
from petals.swarm.libp2p_records import DhtRecords

PEER = "12D3KooWStranger"
ANSWER = {"key": (None, {})}


class Member:
    """Answers as soon as ``awake`` is set."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.num_asked = 0

    async def find(self, peer: object, keys: object) -> object:
        self.num_asked += 1
        await self.awake.wait()
        return ANSWER


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> DhtRecords:
    monkeypatch.setattr(libp2p_records, "_STRANGER_SECONDS", 0.05)
    return DhtRecords(SimpleNamespace(), SystemClock())


async def test_a_stranger_that_does_not_answer_is_left_out(records: DhtRecords) -> None:
    member = Member()
    assert await records._find_others(member.find, PEER, ["key"]) is None
    member.awake.set()
    assert await records._find_others(member.find, PEER, ["key"]) == ANSWER


async def test_who_has_answered_once_has_time(records: DhtRecords) -> None:
    member = Member()
    member.awake.set()
    await records._find_others(member.find, PEER, ["key"])
    member.awake.clear()
    asking = asyncio.create_task(records._find_others(member.find, PEER, ["key"]))
    await asyncio.sleep(0.2)
    assert not asking.done()
    member.awake.set()
    assert await asking == ANSWER


async def test_a_late_answer_is_remembered(records: DhtRecords) -> None:
    member = Member()
    assert await records._find_others(member.find, PEER, ["key"]) is None
    member.awake.set()
    await asyncio.sleep(0.05)
    assert PEER in records._answered


async def test_a_cancelled_search_asks_no_longer(records: DhtRecords) -> None:
    records._answered.add(PEER)
    stopped = SimpleNamespace(happened=False)

    async def find(peer: object, keys: object) -> object:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.happened = True

    asking = asyncio.create_task(records._find_others(find, PEER, ["key"]))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0)
    assert stopped.happened
