"""What the directory is told, and when, by a clock that a test turns."""

import asyncio

import pytest

from petals.server.config import AnnounceConfig
from petals.server.lifecycle.announcer import Announcer
from petals.swarm.directory.records import ServerRecord
from petals.testing.manual_clock import ManualClock
from petals.types import BlockSpan, ServerState

RECORD = ServerRecord(
    peer_id="p",
    model="m",
    num_blocks=4,
    spans=((0, 2),),
    state=ServerState.JOINING,
    expires_at=0.0,
)


class Notebook:
    """A directory that writes down what it hears; it may refuse to take it, or hang."""

    def __init__(self, clock: ManualClock) -> None:
        self.told: list[tuple[float, ServerState, float]] = []
        self.takes = True
        self.hangs = False
        self._clock = clock

    async def announce(self, record: ServerRecord, repository: str = "") -> bool:
        now = self._clock.monotonic()
        self.told.append((now, record.state, record.expires_at - self._clock.now()))
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        return self.takes


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def notebook(clock: ManualClock) -> Notebook:
    return Notebook(clock)


def announcer(notebook: Notebook, clock: ManualClock) -> Announcer:
    config = AnnounceConfig(period_seconds=20.0, expiry_seconds=60.0)
    return Announcer(notebook, RECORD, "repository", config, clock)


async def test_a_life_is_told_from_joining_to_offline(
    notebook: Notebook, clock: ManualClock
) -> None:
    async with announcer(notebook, clock) as speaker:
        await clock.advance(5)
        await speaker.announce(state=ServerState.ONLINE, throughput=3.0)
        assert speaker.record.throughput == 3.0
        await clock.advance(40)
        await speaker.announce_state(ServerState.DRAINING)
    states = [state for _, state, _ in notebook.told]
    assert states == ["joining", "online", "online", "online", "draining", "offline"]
    assert [when for when, _, _ in notebook.told] == [0, 5, 20, 40, 45, 45]
    assert all(left == pytest.approx(60.0) for _, _, left in notebook.told)


async def test_who_moves_tells_where_to_until_it_is_there(
    notebook: Notebook, clock: ManualClock
) -> None:
    async with announcer(notebook, clock) as speaker:
        await speaker.announce_state(ServerState.DRAINING, BlockSpan(3, 5))
        assert speaker.record.next_spans == ((3, 5),)
        await speaker.announce_state(ServerState.ONLINE)
        assert speaker.record.next_spans == ()


async def test_a_record_nobody_took_is_tried_again_soon(
    notebook: Notebook, clock: ManualClock
) -> None:
    async with announcer(notebook, clock):
        notebook.takes = False
        await clock.advance(26.5)
        assert [when for when, _, _ in notebook.told] == [0, 20, 23, 26]
        notebook.takes = True
        await clock.advance(30)
        assert [when for when, _, _ in notebook.told][4:] == [29, 49]


async def test_nobody_listening_does_not_hold_up_a_leaver(
    notebook: Notebook, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.server.lifecycle.announcer._LEAVE_SECONDS", 0.01)
    async with asyncio.timeout(5), announcer(notebook, clock):
        await clock.advance(0)
        notebook.hangs = True
    assert notebook.told[-1][1] is ServerState.OFFLINE
