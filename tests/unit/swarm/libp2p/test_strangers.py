"""Searches in the directory do not wait for members that have never answered."""

import asyncio
from types import SimpleNamespace

import pytest

from petals.clock import SystemClock
from petals.swarm.libp2p import dht
from petals.swarm.libp2p.dht import DhtRecords

PEER = "12D3KooWStranger"
ANSWER = {"key": (None, {})}


class Member:
    """Answers as soon as ``awake`` is set."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()

    async def find(self, peer: object, keys: object) -> object:
        self.asked.set()
        try:
            await self.awake.wait()
            return ANSWER
        finally:
            self.ended.set()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> DhtRecords:
    monkeypatch.setattr(dht, "_STRANGER_SECONDS", 0.0)
    return DhtRecords(SimpleNamespace(), SystemClock())


async def test_a_stranger_that_does_not_answer_is_left_out_and_remembered_later(
    records: DhtRecords,
) -> None:
    member = Member()
    assert await records._find_others(member.find, PEER, ["key"]) is None
    member.awake.set()
    await member.ended.wait()
    # It has answered, if late: now it has as much time as any call.
    member.awake.clear()
    member.asked.clear()
    asking = asyncio.create_task(records._find_others(member.find, PEER, ["key"]))
    await member.asked.wait()
    assert not asking.done()
    member.awake.set()
    assert await asking == ANSWER


async def test_a_cancelled_search_asks_no_longer(records: DhtRecords) -> None:
    records._answered[PEER] = None
    member = Member()
    asking = asyncio.create_task(records._find_others(member.find, PEER, ["key"]))
    await member.asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await member.ended.wait()
