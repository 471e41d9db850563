"""Channels to next hops: opened on demand, shared, reopened once, closed when idle."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from petals.errors import PeerBusy, PeerError, PeerTimeout, PeerUnreachable
from petals.server.network.peer_links import PeerLinks
from petals.swarm.failover_config import FailoverConfig
from petals.testing.manual_clock import ManualClock, settle
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.header import RequestHeader
from petals.wire.requests import GetInfo, KeepSession

PEER = PeerId("peer")
LIMITS = FailoverConfig()


def numbered(number: int) -> Message:
    return KeepSession(RequestHeader(bytes(16), number))


class FakeChannel:
    """Takes messages until it breaks."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.peer_id = PEER
        self.sent: list[Message] = []
        self.is_broken = self.is_closed = self.is_full = self.dies_while_it_sends = False
        self.confirmed_at = 0.0
        self.silence_seconds = self.send_seconds = 0.0
        self.end: asyncio.Future[PeerError] = asyncio.get_running_loop().create_future()

    async def send(self, message: Message, tensors: Sequence[object]) -> None:
        await asyncio.sleep(0)
        if self.is_broken:
            raise PeerUnreachable("broken")
        if self.is_full:
            await self.clock.sleep(self.send_seconds)
            raise PeerTimeout("It takes nothing.")
        self.sent.append(message)
        if self.dies_while_it_sends:
            self.die(PeerUnreachable("broken"))
            await settle()

    async def receive(self, timeout: float) -> tuple[Message, list[object]]:
        timer = self.clock.call_later(timeout, lambda: self.end.done() or self._rest())
        try:
            raise await self.end
        finally:
            timer.cancel()

    def _rest(self) -> None:
        self.end.set_result(PeerTimeout("nothing"))
        self.end = asyncio.get_running_loop().create_future()

    def die(self, error: PeerError) -> None:
        self.is_broken = self.is_closed = True
        self.end.set_result(error)

    abort = die

    async def close(self) -> None:
        self.is_closed = True


class Swarm:
    """Opens channels and counts the attempts."""

    def __init__(self, limits: FailoverConfig = LIMITS) -> None:
        self.clock = ManualClock()
        self.channels: list[FakeChannel] = []
        self.num_dials = 0
        self.is_reachable = True
        self.lost: list[Message] = []
        self.links = PeerLinks(self.open_channel, self.clock, limits)

    async def open_channel(self, peer: PeerId, service: str, timeout: float) -> FakeChannel:
        self.num_dials += 1
        await asyncio.sleep(0)
        if not self.is_reachable:
            raise PeerUnreachable("nobody")
        self.channels.append(FakeChannel(self.clock))
        return self.channels[-1]

    @property
    def num_open(self) -> int:
        return sum(not channel.is_closed for channel in self.channels)

    async def send(self, message: Message | None = None, replay_of: bytes | None = None) -> None:
        message = message or GetInfo()

        async def on_lost() -> None:
            self.lost.append(message)

        await self.links.send(PEER, message, (), on_lost, replay_of=replay_of)


@pytest.fixture
async def swarm(request: pytest.FixtureRequest) -> AsyncIterator[Swarm]:
    """With limits of a test's own by indirect parametrization."""
    made = Swarm(getattr(request, "param", LIMITS))
    yield made
    await made.links.close()
    assert not made.num_open


async def test_all_share_one_channel_and_keep_their_order(swarm: Swarm) -> None:
    messages = [numbered(i) for i in range(5)]
    await asyncio.gather(*map(swarm.send, messages))
    (channel,) = swarm.channels
    assert channel.sent == messages
    assert swarm.num_open == 1
    await swarm.links.close()
    assert channel.is_closed


async def test_a_broken_channel_is_opened_again_but_once(swarm: Swarm) -> None:
    await swarm.send()
    swarm.channels[0].is_broken = True
    await swarm.send()
    assert [len(channel.sent) for channel in swarm.channels] == [1, 1]
    swarm.channels[1].is_broken, swarm.is_reachable = True, False
    with pytest.raises(PeerUnreachable):
        await swarm.send()
    assert swarm.num_dials == 3


async def test_those_in_line_do_not_all_dial_in_vain(swarm: Swarm) -> None:
    swarm.is_reachable = False
    results = await asyncio.gather(*[swarm.send() for _ in range(5)], return_exceptions=True)
    assert all(isinstance(result, PeerUnreachable) for result in results)
    assert swarm.num_dials == 1
    swarm.is_reachable = True
    await swarm.clock.advance(1.0)
    await swarm.send()


async def test_a_replay_has_its_own_channel_and_one_that_rests_is_closed(swarm: Swarm) -> None:
    await swarm.send()
    await swarm.send(replay_of=b"s")
    assert swarm.num_open == 2
    await swarm.clock.advance(LIMITS.replay_link_idle_seconds)
    assert [channel.is_closed for channel in swarm.channels] == [False, True]
    await swarm.send()
    await swarm.clock.advance(LIMITS.link_idle_seconds - 1)
    assert swarm.num_open == 1
    await swarm.clock.advance(LIMITS.link_idle_seconds)
    assert swarm.num_open == 0 and not swarm.lost
    await swarm.send()
    assert swarm.num_dials == 3


@pytest.mark.parametrize("swarm", [FailoverConfig(max_links=2)], indirect=True)
async def test_there_are_only_so_many(swarm: Swarm) -> None:
    await swarm.send(replay_of=b"1")
    await swarm.send(replay_of=b"2")
    with pytest.raises(PeerBusy):
        await swarm.send(replay_of=b"3")
    await swarm.clock.advance(LIMITS.replay_link_idle_seconds)
    await swarm.send(replay_of=b"3")
    assert swarm.num_open == 1


async def test_a_link_is_opened_ahead_of_its_use(swarm: Swarm) -> None:
    swarm.links.connect(PEER)
    swarm.links.connect(PEER)
    await swarm.send()
    assert swarm.num_dials == 1 and len(swarm.channels[0].sent) == 1
    swarm.links.connect(PEER)
    assert swarm.num_dials == 1


async def test_a_link_that_cannot_be_opened_ahead_harms_nobody(swarm: Swarm) -> None:
    swarm.is_reachable = False
    swarm.links.connect(PEER)
    with pytest.raises(PeerUnreachable):
        await swarm.send()


async def test_a_link_that_breaks_tells_in_order_what_may_be_lost(swarm: Swarm) -> None:
    messages = [numbered(i) for i in range(4)]
    for message in messages:
        await swarm.send(message)
        await swarm.clock.advance(1.0)
    (channel,) = swarm.channels
    channel.confirmed_at = 1.5
    channel.die(PeerUnreachable("broken"))
    await settle()
    assert swarm.lost == messages[2:]
    await swarm.send()
    assert swarm.num_dials == 2
    await swarm.links.close()
    assert swarm.lost == messages[2:]


async def test_what_was_sent_while_the_channel_ended_is_sent_again(swarm: Swarm) -> None:
    await swarm.send(numbered(1))
    swarm.channels[0].dies_while_it_sends = True
    await swarm.send(numbered(2))
    assert [channel.sent[-1] for channel in swarm.channels] == [numbered(2), numbered(2)]
    assert swarm.lost == [numbered(1)]


async def test_one_that_cannot_be_told_holds_up_no_other(swarm: Swarm) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    await swarm.links.send(PEER, GetInfo(), (), never)
    await swarm.send()
    swarm.channels[0].die(PeerUnreachable("broken"))
    await settle()
    assert swarm.lost == [GetInfo()]


async def test_who_is_told_of_silence_need_not_dial(swarm: Swarm) -> None:
    await swarm.send()
    (channel,) = swarm.channels
    assert channel.silence_seconds == LIMITS.silence_seconds
    channel.die(PeerTimeout("silent"))
    await settle()
    assert len(swarm.lost) == 1
    with pytest.raises(PeerUnreachable):
        await swarm.send()
    assert swarm.num_dials == 1


@pytest.mark.parametrize(
    "swarm", [FailoverConfig(send_seconds=2.0, link_rest_seconds=1.0)], indirect=True
)
async def test_a_peer_that_takes_nothing_does_not_hold_the_link(swarm: Swarm) -> None:
    """It answers pings and gives no credit; others wait for the link behind the message."""
    await swarm.send()
    swarm.channels[0].is_full = True
    waiting = [asyncio.create_task(swarm.send()) for _ in range(3)]
    await swarm.clock.advance(1.9)
    assert not any(task.done() for task in waiting)
    await swarm.clock.advance(0.1)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [PeerTimeout, *[PeerUnreachable] * 2]
    assert len(swarm.lost) == 1, "the message that was sent before and may not have arrived"
    assert swarm.num_dials == 1, "a new channel would be as full"
    await swarm.clock.advance(1.0)
    await swarm.send()


@pytest.mark.parametrize("swarm", [FailoverConfig(max_unconfirmed=2)], indirect=True)
async def test_only_the_last_sends_are_remembered(swarm: Swarm) -> None:
    for number in range(4):
        await swarm.send(numbered(number))
    swarm.channels[0].die(PeerUnreachable("broken"))
    await settle()
    assert swarm.lost == [numbered(2), numbered(3)]
