"""Channels over the network in memory: order, bounds, credit, silence."""

import asyncio
import contextlib

import pytest
import torch

from petals.errors import (
    PeerBusy,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    RequestTooLarge,
    SessionGap,
)
from petals.swarm.config import ChannelLimits
from petals.swarm.rpc.channel import Channel
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES, Budget, message_cost
from petals.swarm.transport import Stream
from petals.testing.manual_clock import ManualClock, settle
from petals.testing.memory_net import MemoryNet, MemoryStream, _Pipe
from petals.types import PeerId
from petals.wire import frames
from petals.wire.frames import FrameKind, TensorSpec, encode_message
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.requests import GetInfo, KeepSession

A, B = PeerId("peer a"), PeerId("peer b")
LIMITS = ChannelLimits(max_tensor_bytes=64 * 2**20)
MESSAGE = KeepSession(RequestHeader(b"s" * 16, 0))


def streams(net: MemoryNet) -> tuple[MemoryStream, MemoryStream]:
    forth, back = _Pipe(net, A, B), _Pipe(net, B, A)
    return MemoryStream(B, back, forth), MemoryStream(A, forth, back)


def channel(stream: Stream, clock: ManualClock, budget: Budget | None = None) -> Channel:
    return Channel(stream, "test", LIMITS, budget or Budget(2**30, 2**30), clock)


@pytest.fixture
async def pair(net, clock):
    ours, theirs = streams(net)
    async with channel(ours, clock) as a, channel(theirs, clock) as b:
        yield a, b


@pytest.fixture
async def raw(net, clock):
    """A channel, and the bare stream at its other end."""
    ours, theirs = streams(net)
    async with channel(ours, clock) as a:
        yield a, theirs


def frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    return frames.encode_frame(kind, payload)


def begin(*specs: TensorSpec) -> bytes:
    return frame(FrameKind.MESSAGE, encode_message(MESSAGE, specs))


@pytest.mark.parametrize("num_values", [0, 1, 2048, 200_000, 5_000_000])
async def test_messages_arrive_whole_and_in_order(pair, num_values):
    a, b = pair
    sent = [torch.randn(num_values), torch.arange(3), torch.zeros(2, 0), torch.tensor(True)]

    async def send() -> None:
        await a.send(GetInfo())
        await a.send(MESSAGE, sent)
        await a.send(GetInfo())

    sending = asyncio.create_task(send())
    assert (await b.receive())[0] == GetInfo()
    message, received = await b.receive()
    assert message == MESSAGE
    assert len(received) == len(sent)
    for one, other in zip(sent, received):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert await b.receive() == (GetInfo(), [])
    await sending


async def test_many_messages_return_their_credit(pair):
    a, b = pair
    tensor = torch.zeros(2**20 // 4)
    for _ in range(4 * WINDOW_BYTES // 2**20):
        await a.send(MESSAGE, [tensor])
        await b.receive()


async def test_a_reader_that_stops_holds_its_sender_and_nobody_else(net, clock):
    ours, theirs = streams(net)
    other_ours, other_theirs = streams(net)
    async with (
        channel(ours, clock) as a,
        channel(theirs, clock) as stopped,
        channel(other_ours, clock) as c,
        channel(other_theirs, clock) as d,
    ):
        tensor = torch.zeros(2**20 // 4)

        async def flood() -> None:
            while True:
                await a.send(MESSAGE, [tensor])

        flooding = asyncio.create_task(flood())
        await settle()
        received = stopped._inbox._unread_bytes
        assert WINDOW_BYTES / 2 < received <= WINDOW_BYTES
        assert ours.num_unread < 2**20
        for _ in range(3):
            await c.send(MESSAGE, [tensor])
            await d.receive()
        assert not flooding.done()
        assert stopped._inbox._unread_bytes == received
        assert await asyncio.wait_for(a.ping(), 1) >= 0.0
        await stopped.receive()
        await stopped.receive()
        await stopped.receive()
        await settle()
        assert stopped._inbox._unread_bytes > received - 3 * 2**20
        flooding.cancel()
        await asyncio.wait({flooding})


async def test_a_message_larger_than_the_window(pair):
    a, b = pair
    tensor = torch.randn(3 * WINDOW_BYTES // 4)
    sending = asyncio.create_task(a.send(MESSAGE, [tensor]))
    await settle()
    assert not sending.done()
    _, (received,) = await b.receive()
    assert torch.equal(received, tensor)
    await sending


async def test_a_cancelled_send_leaves_the_channel_usable(pair):
    a, b = pair
    sending = asyncio.create_task(a.send(MESSAGE, [torch.zeros(3 * WINDOW_BYTES // 4)]))
    await settle()
    sending.cancel()
    await asyncio.wait({sending})
    await a.send(GetInfo(), [torch.ones(WINDOW_BYTES // 8)])
    message, (received,) = await b.receive()
    assert message == GetInfo()
    assert received.sum() == WINDOW_BYTES // 8
    assert b._inbox._budget.used_bytes == 0


@pytest.mark.parametrize("timeout", [None, 2.0])
async def test_a_peer_that_lives_and_takes_nothing_holds_a_sender_for_a_bounded_time(
    net, clock, timeout
):
    """The peer answers pings and grants no credit."""
    ours, theirs = streams(net)
    tensor = torch.zeros(3 * WINDOW_BYTES // 4)
    limit = LIMITS.send_seconds + tensor.nbytes / LIMITS.min_bytes_per_second
    async with channel(ours, clock) as a, channel(theirs, clock) as b:
        sending = asyncio.create_task(a.send(MESSAGE, [tensor], timeout))
        await clock.advance((timeout or limit) - 0.1)
        assert not sending.done()
        waiting = asyncio.create_task(a.send(GetInfo(), timeout=0.05))
        await clock.advance(0.06)
        with pytest.raises(PeerTimeout):  # the turn of a second sender counts, too
            await waiting
        await clock.advance(1.0)
        with pytest.raises(PeerTimeout, match="did not take") as caught:
            await sending
        assert caught.value.peer_id == B
        # What had arrived of the message is forgotten; the channel is still of use.
        await a.send(GetInfo())
        assert await b.receive() == (GetInfo(), [])
        assert b._inbox._budget.used_bytes == 0


async def test_a_stream_that_takes_no_bytes_holds_a_sender_for_a_bounded_time(net, clock):
    """A peer that reads nothing, but is heard of."""
    ours, theirs = streams(net)
    async with channel(ours, clock) as a:
        sending = asyncio.create_task(a.send(MESSAGE, [torch.zeros(2**20)], timeout=30.0))
        for _ in range(31):
            theirs.write(frame(FrameKind.PONG, b"12345678"))
            await clock.advance(1.0)
        with pytest.raises(PeerTimeout, match="did not take"):
            await sending


async def test_a_request_has_one_time_limit_for_both_ways(pair, clock):
    a, b = pair
    requesting = asyncio.create_task(
        a.request(MESSAGE, [torch.zeros(3 * WINDOW_BYTES // 4)], expect=KeepSession, timeout=5.0)
    )
    await clock.advance(3.0)
    await b.receive()
    await clock.advance(1.9)
    assert not requesting.done()
    await clock.advance(0.2)
    with pytest.raises(PeerTimeout):
        await requesting


async def test_own_messages_are_bounded(pair):
    a, _ = pair
    with pytest.raises(RequestTooLarge):
        await a.send(MESSAGE, [torch.zeros(2**20, dtype=torch.int64).expand(9, -1)])
    assert not a.is_closed


async def test_request_raises_what_the_peer_refused_with(pair):
    a, b = pair
    refusing = asyncio.create_task(b.send(Refusal("session_gap", "There is a gap.", "Go back.")))
    with pytest.raises(SessionGap, match="gap. \\(Go back.\\)") as caught:
        await a.request(MESSAGE, expect=KeepSession)
    assert caught.value.hint == SessionGap.default_hint
    assert caught.value.peer_id == B
    await refusing


async def test_request_answered_with_something_else(pair):
    a, b = pair
    await b.send(GetInfo())
    with pytest.raises(ProtocolError, match="Expected KeepSession"):
        await a.request(MESSAGE, expect=KeepSession)


async def test_receive_timeout_leaves_the_channel_usable(pair, clock):
    a, b = pair
    receiving = asyncio.create_task(a.receive(timeout=3.0))
    await clock.advance(2.9)
    assert not receiving.done()
    await clock.advance(0.2)
    with pytest.raises(PeerTimeout, match="3 s"):
        await receiving
    await b.send(GetInfo())
    assert (await a.receive())[0] == GetInfo()


async def test_long_waits_are_fine_while_the_peer_lives(pair, clock):
    a, b = pair
    receiving = asyncio.create_task(a.receive())
    await clock.advance(600.0)
    assert not receiving.done()
    assert clock.monotonic() - a.heard_at <= LIMITS.silence_seconds / 2
    await b.send(GetInfo())
    await receiving


async def test_silence_is_noticed_while_something_is_pending(net, pair, clock):
    a, _ = pair
    await clock.advance(5.0)
    net.cut(A, B)
    await clock.advance(60.0)
    assert not a.is_closed
    receiving = asyncio.create_task(a.receive())
    await clock.advance(LIMITS.silence_seconds - 0.1)
    assert not receiving.done()
    await clock.advance(0.2)
    with pytest.raises(PeerTimeout, match="sign of life"):
        await receiving
    with pytest.raises(PeerTimeout):
        await a.send(GetInfo())


async def test_silence_ends_a_send_that_waits_for_credit(net, pair, clock):
    a, _ = pair
    sending = asyncio.create_task(a.send(MESSAGE, [torch.zeros(3 * WINDOW_BYTES // 4)]))
    await settle()
    net.cut(A, B)
    await clock.advance(LIMITS.silence_seconds + 0.1)
    with pytest.raises(PeerTimeout):
        await sending


async def test_nothing_is_sent_while_nothing_is_pending(raw, clock):
    _, stream = raw
    await clock.advance(100.0)
    stream.write(frame(FrameKind.PING, b"12345678"))
    assert await stream.read_exactly(13) == frame(FrameKind.PONG, b"12345678")


async def test_ping_measures_the_round_trip(net, pair, clock):
    a, _ = pair
    net.latency_seconds = 0.05
    pinging = asyncio.create_task(a.ping())
    await clock.advance(0.2)
    assert await pinging == pytest.approx(0.1)


async def test_ping_timeout(net, pair, clock):
    a, _ = pair
    net.cut(A, B)
    pinging = asyncio.create_task(a.ping(timeout=2.0))
    await clock.advance(2.1)
    with pytest.raises(PeerTimeout):
        await pinging


async def test_the_end_is_told_to_everybody(pair):
    a, b = pair
    receiving = asyncio.create_task(a.receive())
    sending = asyncio.create_task(a.send(MESSAGE, [torch.zeros(3 * WINDOW_BYTES // 4)]))
    pinging = asyncio.create_task(a.ping())
    await settle()
    await pinging
    await b.close()
    for task in (receiving, sending):
        with pytest.raises(PeerUnreachable):
            await task
    with pytest.raises(PeerUnreachable):
        await a.ping()
    assert a.is_closed
    await b.close()


async def test_messages_before_the_end_can_still_be_read(pair):
    a, b = pair
    await b.send(GetInfo())
    await b.close()
    await settle()
    assert a.is_closed
    assert (await a.receive())[0] == GetInfo()
    with pytest.raises(PeerUnreachable):
        await a.receive()


async def test_a_parting_refusal_is_the_reason_of_the_end(pair):
    a, b = pair
    await b.send(Refusal("session_gap", "There is a gap."))
    await b.close()
    await settle()
    with pytest.raises(SessionGap):
        await a.send(GetInfo())


async def test_two_receivers_are_a_mistake(pair):
    a, b = pair
    first = asyncio.create_task(a.receive())
    await settle()
    with pytest.raises(RuntimeError):
        await a.receive()
    await b.send(GetInfo())
    await first


async def test_empty_messages_wait_for_their_reader_too(pair):
    a, b = pair

    async def flood() -> None:
        for _ in range(20_000):
            await a.send(MESSAGE)

    flooding = asyncio.create_task(flood())
    await settle()
    assert not flooding.done()
    for _ in range(20_000):
        await b.receive()
    await flooding


async def test_budget_is_for_all_channels(net, clock):
    ours, theirs = streams(net)
    cost = message_cost(encode_message(MESSAGE, (TensorSpec("float32", (100,)),))) + 400
    budget = Budget(total_bytes=3 * cost, per_peer_bytes=2 * cost - 1)
    async with channel(ours, clock) as a, channel(theirs, clock, budget) as b:
        await a.send(MESSAGE, [torch.zeros(100)])
        await settle()
        assert budget.used_bytes == cost
        await a.send(MESSAGE, [torch.zeros(100)])
        await settle()
        with pytest.raises(PeerBusy):
            await a.send(MESSAGE)
        assert (await b.receive())[0] == MESSAGE
        assert budget.used_bytes == 0


HUGE = TensorSpec("float32", (2**28,))
SMALL = TensorSpec("float32", (4,))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x00\x00",
        b"\x63\x00\x00\x00\x01x",
        frames.encode_header(FrameKind.MESSAGE, 2**31),
        frames.encode_header(FrameKind.CHUNK, 2**24),
        frames.encode_header(FrameKind.PING, 9),
        frame(FrameKind.MESSAGE, b""),
        frame(FrameKind.MESSAGE, b"\xc1garbage"),
        frame(FrameKind.MESSAGE, b"\x91" * 5000),
        frame(FrameKind.MESSAGE, b"\x92\x92\xa7Refusal\xa1\x80\x90"),
        frame(FrameKind.CHUNK, b"1234"),
        frame(FrameKind.CANCEL),
        frame(FrameKind.CREDIT, b"\xff\xff\xff\xff"),
        begin(HUGE),
        begin(TensorSpec("object", (1,))),
        begin(TensorSpec("float32", (-1,))),
        begin(TensorSpec("float32", (0, 2**39, 2**39))),
        begin(SMALL) + begin(),
        begin(SMALL) + frame(FrameKind.CHUNK, bytes(17)),
        begin(SMALL) + frame(FrameKind.CHUNK),
        begin() * (WINDOW_BYTES // 1024),
    ],
    ids=range(20),
)
async def test_bytes_that_are_not_our_protocol(raw, data):
    a, stream = raw
    stream.write(data)
    await settle()
    assert a.is_closed
    with pytest.raises(ProtocolError):
        while True:
            await a.receive()
    assert a._inbox._budget.used_bytes == 0
    kind, length = frames.decode_header(await stream.read_exactly(5))
    assert kind is FrameKind.MESSAGE
    assert b"protocol" in await stream.read_exactly(length)


async def test_a_sender_without_credit_is_cut_off(raw):
    a, stream = raw
    size = WINDOW_BYTES + 2**20
    stream.write(begin(TensorSpec("uint8", (size,))))
    for _ in range(size // 2**20):
        stream.write(frame(FrameKind.CHUNK, bytes(2**20)))
    await settle()
    with pytest.raises(ProtocolError, match="credit"):
        await a.receive()


async def test_a_stream_that_ends_inside_a_frame(raw):
    a, stream = raw
    stream.write(begin(SMALL)[:-3])
    await stream.close()
    with pytest.raises(PeerUnreachable):
        await a.receive()


async def test_close_while_the_reader_holds_a_message(raw):
    a, stream = raw
    stream.write(begin(SMALL) + frame(FrameKind.CHUNK, bytes(8)))
    await settle()
    assert a._inbox._budget.used_bytes > 16
    await a.close()
    assert a._inbox._budget.used_bytes == 0
    with contextlib.suppress(PeerUnreachable):
        await stream.drain()


@pytest.mark.parametrize(
    "data",
    [begin() * 100, frames.encode_header(FrameKind.MESSAGE, 100_000)],
    ids=["small messages nobody reads", "a frame that does not come"],
)
async def test_everything_a_peer_sends_is_counted(net, clock, data):
    ours, theirs = streams(net)
    budget = Budget(total_bytes=2**20, per_peer_bytes=99_000)
    async with channel(ours, clock, budget):
        theirs.write(data)
        await settle()
        kind, length = frames.decode_header(await theirs.read_exactly(5))
        assert kind is FrameKind.MESSAGE
        assert b"peer_busy" in await theirs.read_exactly(length)
    assert budget.used_bytes == 0
