"""Greeting, admission, services: what a peer learns and what it does not."""

import asyncio
import contextlib
from unittest.mock import Mock

import msgspec
import pytest
import torch

from petals.errors import (
    AdmissionDenied,
    BadInput,
    NotSupported,
    PeerBusy,
    PeerFailed,
    PeerUnreachable,
    ProtocolError,
    VersionMismatch,
)
from petals.swarm.config import ChannelLimits, NodeConfig
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL, RpcParts, RpcServer, answering
from petals.swarm.rpc.receive_buffer import Budget
from petals.testing.manual_clock import settle
from petals.wire import frames
from petals.wire.frames import PROTOCOL_VERSION, FrameKind
from petals.wire.handshake import Hello, Refusal, Welcome
from petals.wire.header import RequestHeader
from petals.wire.passes import Forward, ForwardResult
from petals.wire.requests import GetInfo, KeepSession
from support.raw_streams import encoded, read_message

FORWARD = Forward("m", (0, 2), (1,))
NEWER = PROTOCOL_VERSION + 1
KEY = SwarmKey.generate()


async def double(peer, message, tensors):
    if not tensors:
        raise BadInput("There is nothing to double.")
    return ForwardResult(0.0, 0.0), [2 * tensor for tensor in tensors]


async def broken(peer, message, tensors):
    raise ZeroDivisionError("a bug")


@pytest.fixture
async def doubler(server, client):
    """The client's channel to a service that doubles tensors."""
    server.serve("double", answering({Forward: double}))
    async with await client.open_channel(server.peer_id, "double") as channel:
        yield channel


@pytest.fixture
async def node(net, clock):
    """``await node(**config)`` -> a member of the network, until the test ends."""
    async with contextlib.AsyncExitStack() as nodes:

        async def enter(**config) -> SwarmNode:
            member = SwarmNode(NodeConfig(**config), engine=net.engine, clock=clock)
            return await nodes.enter_async_context(member)

        yield enter


@pytest.fixture
async def rpc(server, client, clock):
    """What answers the streams to ``server``, with a limit of 300 streams of each peer."""
    limits, budget = ChannelLimits(max_streams_per_peer=300), Budget(2**30, 2**30)
    parts = RpcParts(admission=server.admission, limits=limits, budget=budget, clock=clock)
    rpc = RpcServer(parts)
    await server.transport.serve(STREAM_PROTOCOL, rpc.handle)
    yield rpc
    await rpc.close()


async def test_requests_are_answered_one_by_one_refused_ones_too(server, doubler):
    assert doubler.peer_id == server.peer_id
    for _ in range(3):
        _, (answer,) = await doubler.request(FORWARD, [torch.ones(5)], expect=ForwardResult)
        assert answer.sum() == 10
        with pytest.raises(BadInput, match="nothing to double"):
            await doubler.request(FORWARD, expect=ForwardResult)


async def test_a_message_the_service_does_not_know(doubler):
    with pytest.raises(ProtocolError, match="GetInfo"):
        await doubler.request(GetInfo(), expect=ForwardResult)


async def test_a_bug_in_a_service_is_reported_without_details(server, client, caplog):
    server.serve("broken", answering({Forward: broken}))
    async with await client.open_channel(server.peer_id, "broken") as channel:
        with pytest.raises(PeerFailed) as caught:
            await channel.request(FORWARD, expect=ForwardResult)
    assert "a bug" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text
    assert await client.ping(server.peer_id) >= 0


async def test_unknown_service(server, client):
    with pytest.raises(NotSupported, match="cookies"):
        await client.open_channel(server.peer_id, "cookies")
    server.serve("cookies", answering({}))
    await (await client.open_channel(server.peer_id, "cookies")).close()


async def test_streams_of_a_peer_are_bounded(server, client):
    limit = server.config.limits.max_streams_per_peer
    for _ in range(2):  # once all are closed, the same number may be opened again
        opened = [await client.open_channel(server.peer_id, "node") for _ in range(limit)]
        with pytest.raises(PeerBusy):
            await client.open_channel(server.peer_id, "node")
        for channel in opened:
            await channel.close()
        await settle()


@pytest.mark.parametrize("asks", [True, False], ids=["joining", "asked by a member"])
@pytest.mark.parametrize("key", [None, SwarmKey.generate()], ids=["no key", "another key"])
async def test_a_private_swarm_and_others_refuse_each_other(node, key, asks):
    """Both sides of a stream prove that they hold the key."""
    member = await node(swarm_key=KEY)
    with pytest.raises(AdmissionDenied) as caught:
        if asks:
            await node(initial_peers=await member.addresses(), swarm_key=key)
        else:
            stranger = await node(swarm_key=key)
            await member.open_channel(stranger.peer_id, "node")
    assert "--swarm-key" in caught.value.hint


async def test_a_key_in_an_open_swarm_is_said_to_be_too_much(node):
    """It must not say that a key is required: one was given."""
    open_peer = await node()
    with pytest.raises(AdmissionDenied, match="key was given") as caught:
        await node(initial_peers=await open_peer.addresses(), swarm_key=KEY)
    assert "required" not in str(caught.value)
    assert "leave the key out" in caught.value.hint and "PETALS_SWARM_KEY" in caught.value.hint


async def test_without_the_key_only_a_refusal_comes_back(node):
    member, stranger = await node(swarm_key=KEY), await node()
    stream = await stranger.transport.open_stream(member.peer_id, STREAM_PROTOCOL, 1.0)
    stream.write(encoded(Hello(PROTOCOL_VERSION, "node")) + encoded(GetInfo()))
    answer = await read_message(stream)
    assert isinstance(answer, Refusal) and answer.code == "admission_denied"
    with pytest.raises(PeerUnreachable):
        await stream.read_exactly(1)


async def test_members_of_a_private_swarm(node):
    one = await node(swarm_key=KEY)
    two = await node(swarm_key=KEY, initial_peers=await one.addresses())
    assert await two.ping(one.peer_id) >= 0
    assert await one.ping(two.peer_id) >= 0


UNREADABLE_HELLO = msgspec.msgpack.encode([["Hello", NEWER, {"new": "shape"}], [], "more"])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "protocol"),
        (frames.encode_header(FrameKind.MESSAGE, 200_000), "protocol"),
        (frames.encode_frame(FrameKind.PING, b"12345678"), "protocol"),
        (encoded(KeepSession(RequestHeader(b"s" * 16, 0))), "protocol"),
        (frames.encode_frame(FrameKind.MESSAGE, b"\xc1" * 20), "protocol"),
        (frames.encode_frame(FrameKind.MESSAGE, b"\x91" * 10_000), "protocol"),
        (encoded(Hello(NEWER, "node")), "version_mismatch"),
        (frames.encode_frame(FrameKind.MESSAGE, UNREADABLE_HELLO), "version_mismatch"),
    ],
    ids=range(8),
)
async def test_a_stream_that_does_not_begin_with_our_greeting(rpc, server, client, data, code):
    stream = await client.transport.open_stream(server.peer_id, STREAM_PROTOCOL, 1.0)
    stream.write(data)
    answer = await read_message(stream)
    assert isinstance(answer, Refusal) and answer.code == code
    assert (f"the other {NEWER}" in answer.message) is (code == "version_mismatch")
    await settle()
    assert rpc.num_streams == 0


@pytest.mark.parametrize(
    ("answer", "error"), [(Welcome(NEWER), VersionMismatch), (GetInfo(), ProtocolError)]
)
async def test_a_greeting_that_is_not_answered_with_one_of_ours(server, client, answer, error):
    """A newer peer that answers in place of refusing is noticed by the peer that opened."""

    async def reply(stream):
        await read_message(stream)
        stream.write(encoded(answer))

    await server.transport.serve(STREAM_PROTOCOL, reply)
    with pytest.raises(error):
        await client.open_channel(server.peer_id, "node")


async def test_leaving_ends_services_that_wait(node, client):
    ended = []

    async def waits(channel):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(channel.peer_id)

    leaving = await node()
    leaving.serve("waits", waits)
    channel = await client.open_channel(leaving.peer_id, "waits")
    await settle()
    await leaving.close()
    assert ended == [client.peer_id]
    with pytest.raises(PeerUnreachable):
        await channel.receive()


async def test_a_service_ends_when_its_client_vanishes(net, rpc, server, client):
    ended = asyncio.Event()

    async def session(channel):
        try:
            await channel.receive()
        finally:
            ended.set()

    rpc.add("session", session)
    await client.open_channel(server.peer_id, "session")
    net.kill(client.peer_id)
    await asyncio.wait_for(ended.wait(), 1.0)
    await settle()
    assert rpc.num_streams == 0


async def test_silent_streams_keep_no_peer_out(rpc, server, client):
    """Of the streams that have sent nothing the oldest makes room for a new one."""
    rpc.add("double", answering({Forward: double}))
    open_stream = client.transport.open_stream
    silent = [await open_stream(server.peer_id, STREAM_PROTOCOL, 1.0) for _ in range(258)]
    await settle()
    assert rpc.num_streams == 256
    async with await client.open_channel(server.peer_id, "double"):
        for stream in silent[:3]:
            with pytest.raises(PeerUnreachable):
                await stream.read_exactly(1)
        assert rpc.num_streams == 254 + 1 + 1
    for stream in silent[3:]:
        stream.reset()
    await settle()
    assert rpc.num_streams == 0


class SlowStream:
    """A stream whose bytes, and whose end, take until ``over``."""

    remote = "peer"

    def __init__(self, over: asyncio.Event) -> None:
        self.over, self.close = over, over.wait
        self.write, self.reset = Mock(), Mock()

    async def read_exactly(self, num_bytes: int) -> bytes:
        await self.over.wait()
        raise PeerUnreachable("The stream ended.")


async def test_a_peer_that_floods_is_not_even_refused(rpc):
    """Refusals that are on their way count as streams, up to as many as may be open."""
    over, limit = asyncio.Event(), 2 * rpc.parts.limits.max_streams_per_peer
    streams = [SlowStream(over) for _ in range(limit + 1)]
    async with asyncio.TaskGroup() as handling:
        for stream in streams:
            handling.create_task(rpc.handle(stream))
        await settle()
        assert rpc.num_streams == limit
        assert [stream.reset.called for stream in streams[-2:]] == [False, True]
        over.set()


def test_the_text_of_a_peer_cannot_command_a_terminal():
    error = Refusal("bad_input", "a\x1b[2Jb", "c\x07").to_error("peer")
    assert isinstance(error, BadInput)
    assert (error.message, error.reported_hint) == ("a [2Jb", "c ")
    assert error.hint == BadInput.default_hint
