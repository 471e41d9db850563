"""Searches in the directory do not wait for members that have never answered."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from hivemind.dht.protocol import DHTProtocol

from petals.clock import SystemClock
from petals.swarm.libp2p import dht
from petals.swarm.libp2p.dht import DhtRecords
from petals.swarm.membership import Admission
from petals.types import PeerId

PEER = "12D3KooWStranger"
ANSWER = {"key": (None, {})}


class OneMember(DHTProtocol):
    """hivemind's protocol with a member that answers as soon as ``awake`` is set."""

    def __init__(self) -> None:
        self.awake, self.asked, self.ended = (asyncio.Event() for _ in range(3))

    async def call_find(self, peer: object, keys: object) -> object:
        self.asked.set()
        try:
            await self.awake.wait()
            return ANSWER
        finally:
            self.ended.set()


@pytest.fixture
async def member(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OneMember]:
    """Its ``call_find`` is the one that searches use."""
    member = OneMember()
    node = SimpleNamespace(protocol=member)
    monkeypatch.setattr(dht, "_STRANGER_SECONDS", 0.0)
    monkeypatch.setattr(dht.DHTNode, "create", AsyncMock(return_value=node))
    records = DhtRecords(Admission(PeerId("own"), None), SystemClock())
    await records.start(None, only_asks=True)
    yield member
    await records.close()


async def test_a_stranger_that_does_not_answer_is_left_out_and_remembered_later(
    member: OneMember,
) -> None:
    assert await member.call_find(PEER, ["key"]) is None
    member.awake.set()
    await member.ended.wait()
    # It has answered, if late: now it has as much time as any call.
    member.awake.clear()
    member.asked.clear()
    asking = asyncio.create_task(member.call_find(PEER, ["key"]))
    await member.asked.wait()
    assert not asking.done()
    member.awake.set()
    assert await asking == ANSWER


async def test_a_cancelled_search_asks_no_longer(member: OneMember) -> None:
    member.awake.set()
    await member.call_find(PEER, ["key"])
    await member.ended.wait()
    for event in (member.awake, member.asked, member.ended):
        event.clear()
    asking = asyncio.create_task(member.call_find(PEER, ["key"]))
    await member.asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await member.ended.wait()
