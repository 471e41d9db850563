"""What is announced to the directory, and when."""

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


class RecordingDirectory:
    """A directory that notes time, state and remaining life of records; it may refuse or hang."""

    def __init__(self, clock: ManualClock) -> None:
        self.announced: list[tuple[float, ServerState, float]] = []
        self.takes = True
        self.hangs = False
        self._clock = clock

    async def announce(self, record: ServerRecord, repository: str = "") -> bool:
        now = self._clock.monotonic()
        self.announced.append((now, record.state, record.expires_at - self._clock.now()))
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        return self.takes


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def directory(clock: ManualClock) -> RecordingDirectory:
    return RecordingDirectory(clock)


def announcer(directory: RecordingDirectory, clock: ManualClock) -> Announcer:
    config = AnnounceConfig(period_seconds=20.0, expiry_seconds=60.0)
    return Announcer(directory, RECORD, "repository", config, clock)


async def test_a_life_is_announced_from_joining_to_offline(
    directory: RecordingDirectory, clock: ManualClock
) -> None:
    async with announcer(directory, clock) as speaker:
        await clock.advance(5)
        await speaker.announce(state=ServerState.ONLINE, throughput=3.0)
        assert speaker.record.throughput == 3.0
        await clock.advance(40)
        await speaker.announce_state(ServerState.DRAINING)
    states = [state for _, state, _ in directory.announced]
    assert states == ["joining", "online", "online", "online", "draining", "offline"]
    assert [when for when, _, _ in directory.announced] == [0, 5, 20, 40, 45, 45]
    assert all(left == pytest.approx(60.0) for _, _, left in directory.announced)


async def test_a_server_that_moves_announces_its_next_blocks(
    directory: RecordingDirectory, clock: ManualClock
) -> None:
    async with announcer(directory, clock) as speaker:
        await speaker.announce_state(ServerState.DRAINING, BlockSpan(3, 5))
        assert speaker.record.next_spans == ((3, 5),)
        await speaker.announce_state(ServerState.ONLINE)
        assert speaker.record.next_spans == ()


async def test_a_record_that_no_peer_took_is_tried_again_soon(
    directory: RecordingDirectory, clock: ManualClock
) -> None:
    async with announcer(directory, clock):
        directory.takes = False
        await clock.advance(26.5)
        assert [when for when, _, _ in directory.announced] == [0, 20, 23, 26]
        directory.takes = True
        await clock.advance(30)
        assert [when for when, _, _ in directory.announced][4:] == [29, 49]


async def test_a_directory_that_hangs_does_not_hold_up_the_end(
    directory: RecordingDirectory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.server.lifecycle.announcer._LEAVE_SECONDS", 0.01)
    async with asyncio.timeout(5), announcer(directory, clock):
        await clock.advance(0)
        directory.hangs = True
    assert directory.announced[-1][1] is ServerState.OFFLINE
