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
from petals.testing.manual_clock import settle
from petals.wire import frames
from petals.wire.frames import FrameKind, TensorSpec, encode_message
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.requests import GetInfo, KeepSession

LIMITS = ChannelLimits(max_tensor_bytes=64 * 2**20)
MESSAGE = KeepSession(RequestHeader(b"s" * 16, 0))
MIB_TENSOR = torch.zeros(2**20 // 4)
LARGE = torch.zeros(3 * WINDOW_BYTES // 4)
"""Three windows of bytes: sending it waits until the other end reads."""


@pytest.fixture
def budget() -> Budget:
    """Memory of all channels of a test."""
    return Budget(2**30, 2**30)


@pytest.fixture
def channel(clock, budget):
    """``channel(stream)`` -> a channel on it."""
    return lambda stream: Channel(stream, "test", LIMITS, budget, clock)


@pytest.fixture
async def raw(connect, channel):
    """A channel, and the bare stream at its other end."""
    ours, theirs = await connect()
    async with channel(ours) as a:
        yield a, theirs


@pytest.fixture
async def pair(raw, channel):
    a, theirs = raw
    async with channel(theirs) as b:
        yield a, b


def frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    return frames.encode_frame(kind, payload)


def begin(*specs: TensorSpec) -> bytes:
    return frame(FrameKind.MESSAGE, encode_message(MESSAGE, specs))


async def refusal_on(stream) -> bytes:
    kind, length = frames.decode_header(await stream.read_exactly(5))
    assert kind is FrameKind.MESSAGE
    return await stream.read_exactly(length)


@pytest.mark.parametrize("num_values", [0, 1, 2048, 200_000, LARGE.numel()])
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


async def test_a_reader_that_stops_holds_its_sender_and_no_other_stream(
    pair, connect, channel, budget
):
    a, stopped = pair
    ours, theirs = await connect()
    async with channel(ours) as c, channel(theirs) as d:

        async def flood() -> None:
            while True:
                await a.send(MESSAGE, [MIB_TENSOR])

        flooding = asyncio.create_task(flood())
        await settle()
        held = budget.used_bytes
        assert WINDOW_BYTES / 2 < held <= WINDOW_BYTES + 2 * 2**20
        for _ in range(3):
            await c.send(MESSAGE, [MIB_TENSOR])
            await d.receive()
        assert not flooding.done()
        assert budget.used_bytes == held
        assert await asyncio.wait_for(a.ping(), 1) >= 0.0
        for _ in range(4 * WINDOW_BYTES // 2**20):  # what was read is credit again
            await asyncio.wait_for(stopped.receive(), 1)
        await settle()
        assert budget.used_bytes > held - 3 * 2**20
        flooding.cancel()
        await asyncio.wait({flooding})


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


async def test_a_cancelled_send_leaves_the_channel_usable(pair, budget):
    a, b = pair
    sending = asyncio.create_task(a.send(MESSAGE, [LARGE]))
    await settle()
    sending.cancel()
    await asyncio.wait({sending})
    await a.send(GetInfo(), [torch.ones(WINDOW_BYTES // 8)])
    message, (received,) = await b.receive()
    assert message == GetInfo()
    assert received.sum() == WINDOW_BYTES // 8
    assert budget.used_bytes == 0


@pytest.mark.parametrize("timeout", [None, 2.0])
async def test_a_peer_that_answers_pings_and_grants_no_credit_holds_a_sender_for_a_bounded_time(
    pair, clock, budget, timeout
):
    a, b = pair
    limit = timeout or LIMITS.send_seconds + LARGE.nbytes / LIMITS.min_bytes_per_second
    sending = asyncio.create_task(a.send(MESSAGE, [LARGE], timeout))
    await clock.advance(limit - 0.1)
    assert not sending.done()
    waiting = asyncio.create_task(a.send(GetInfo(), timeout=0.05))
    await clock.advance(0.06)
    with pytest.raises(PeerTimeout):  # the time until a second sender's turn counts, too
        await waiting
    await clock.advance(1.0)
    with pytest.raises(PeerTimeout, match="did not take") as caught:
        await sending
    assert caught.value.peer_id == a.peer_id
    # What had arrived of the message is forgotten; the channel is still of use.
    await a.send(GetInfo())
    assert await b.receive() == (GetInfo(), [])
    assert budget.used_bytes == 0


async def test_a_stream_that_takes_no_bytes_holds_a_sender_for_a_bounded_time(raw, clock):
    """The peer reads nothing, but its frames arrive."""
    a, theirs = raw
    sending = asyncio.create_task(a.send(MESSAGE, [torch.zeros(2**20)], timeout=30.0))
    for _ in range(31):
        theirs.write(frame(FrameKind.PONG, b"12345678"))
        await clock.advance(1.0)
    with pytest.raises(PeerTimeout, match="did not take"):
        await sending


async def test_a_request_has_one_time_limit_for_both_ways(pair, clock):
    a, b = pair
    requesting = asyncio.create_task(a.request(MESSAGE, [LARGE], expect=KeepSession, timeout=5.0))
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


async def test_a_request_raises_what_the_peer_refused_with(pair):
    a, b = pair
    await b.send(Refusal("session_gap", "There is a gap.", "Go back."))
    with pytest.raises(SessionGap, match="gap. \\(Go back.\\)") as caught:
        await a.request(MESSAGE, expect=KeepSession)
    assert caught.value.hint == SessionGap.default_hint
    assert caught.value.peer_id == a.peer_id
    assert not a.is_closed


async def test_a_request_answered_with_another_type(pair):
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


async def test_a_wait_is_not_limited_while_the_peer_answers_pings(pair, clock):
    a, b = pair
    receiving = asyncio.create_task(a.receive())
    await clock.advance(600.0)
    assert not receiving.done()
    assert clock.monotonic() - a.heard_at <= LIMITS.silence_seconds / 2
    await b.send(GetInfo())
    await receiving


WAITS = {"receive": lambda a: a.receive(), "send": lambda a: a.send(MESSAGE, [LARGE])}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
async def test_silence_is_noticed_while_something_is_pending(net, pair, clock, wait):
    a, b = pair
    net.cut(a.peer_id, b.peer_id)
    await clock.advance(60.0)
    assert not a.is_closed
    waiting = asyncio.create_task(wait(a))
    await clock.advance(LIMITS.silence_seconds - 0.1)
    assert not waiting.done()
    await clock.advance(0.2)
    with pytest.raises(PeerTimeout, match="sign of life"):
        await waiting
    with pytest.raises(PeerTimeout):
        await a.send(GetInfo())


async def test_the_end_of_the_stream_ends_every_wait(pair):
    a, b = pair
    waiting = [asyncio.create_task(wait(a)) for wait in WAITS.values()]
    await settle()
    assert not any(task.done() for task in waiting)
    for _ in range(2):
        await b.close()
    for wait in (*waiting, a.ping()):
        with pytest.raises(PeerUnreachable):
            await wait
    assert a.is_closed


async def test_nothing_is_sent_while_nothing_is_pending(raw, clock):
    _, stream = raw
    await clock.advance(100.0)
    stream.write(frame(FrameKind.PING, b"12345678"))
    assert await stream.read_exactly(13) == frame(FrameKind.PONG, b"12345678")


async def test_ping_measures_the_round_trip_within_its_timeout(net, pair, clock):
    a, b = pair
    net.latency_seconds = 0.05
    pinging = asyncio.create_task(a.ping())
    await clock.advance(0.2)
    assert await pinging == pytest.approx(0.1)
    net.cut(a.peer_id, b.peer_id)
    pinging = asyncio.create_task(a.ping(timeout=2.0))
    await clock.advance(2.1)
    with pytest.raises(PeerTimeout):
        await pinging


async def test_messages_before_the_end_can_still_be_read(pair):
    a, b = pair
    await b.send(GetInfo())
    await b.close()
    await settle()
    assert a.is_closed
    assert (await a.receive())[0] == GetInfo()
    with pytest.raises(PeerUnreachable):
        await a.receive()


async def test_a_last_refusal_is_the_reason_of_the_end(pair):
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


HUGE = TensorSpec("float32", (2**28,))
SMALL = TensorSpec("float32", (4,))
BEYOND_CREDIT = begin(TensorSpec("uint8", (WINDOW_BYTES + 2**20,))) + 9 * frame(
    FrameKind.CHUNK, bytes(2**20)
)


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
        BEYOND_CREDIT,
    ],
    ids=range(21),
)
async def test_bytes_that_are_not_our_protocol(raw, budget, data):
    a, stream = raw
    stream.write(data)
    await settle()
    assert a.is_closed
    with pytest.raises(ProtocolError):
        while True:
            await a.receive()
    assert budget.used_bytes == 0
    assert b"protocol" in await refusal_on(stream)


async def test_a_stream_that_ends_inside_a_frame(raw):
    a, stream = raw
    stream.write(begin(SMALL)[:-3])
    await stream.close()
    with pytest.raises(PeerUnreachable):
        await a.receive()


async def test_close_while_a_message_is_incomplete(raw, budget):
    a, stream = raw
    stream.write(begin(SMALL) + frame(FrameKind.CHUNK, bytes(8)))
    await settle()
    assert budget.used_bytes > 16
    await a.close()
    assert budget.used_bytes == 0
    with contextlib.suppress(PeerUnreachable):
        await stream.drain()


ONE_COST = message_cost(encode_message(MESSAGE, (TensorSpec("float32", (100,)),))) + 400


@pytest.mark.parametrize(
    "budget",
    [Budget(3 * ONE_COST, 2 * ONE_COST - 1), Budget(2 * ONE_COST - 1, 3 * ONE_COST)],
    ids=["of one peer", "of all peers"],
)
async def test_a_message_beyond_the_budget_is_refused(pair, budget):
    a, b = pair
    await a.send(MESSAGE, [torch.zeros(100)])
    await settle()
    assert budget.used_bytes == ONE_COST
    await a.send(MESSAGE, [torch.zeros(100)])
    await settle()
    with pytest.raises(PeerBusy):
        await a.send(MESSAGE)
    assert (await b.receive())[0] == MESSAGE
    await a.close()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("budget", [Budget(total_bytes=2**20, per_peer_bytes=99_000)])
@pytest.mark.parametrize(
    "data",
    [begin() * 100, frames.encode_header(FrameKind.MESSAGE, 100_000)],
    ids=["small messages that are not read", "a frame that does not come"],
)
async def test_everything_a_peer_sends_is_counted(raw, budget, data):
    a, stream = raw
    stream.write(data)
    await settle()
    assert b"peer_busy" in await refusal_on(stream)
    await a.close()
    assert budget.used_bytes == 0
