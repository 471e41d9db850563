"""Greeting, admission, services: what a peer is told and what it is not."""

import asyncio

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
from petals.swarm.config import NodeConfig
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.swarm.rpc import dispatcher
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL, answering
from petals.testing.manual_clock import settle
from petals.wire import frames
from petals.wire.frames import PROTOCOL_VERSION, FrameKind, decode_message, encode_message
from petals.wire.handshake import Hello, Refusal, Welcome
from petals.wire.header import RequestHeader
from petals.wire.passes import Forward, ForwardResult
from petals.wire.requests import GetInfo, KeepSession

FORWARD = Forward("m", (0, 2), (1,))


async def double(peer, message, tensors):
    if not tensors:
        raise BadInput("There is nothing to double.")
    return ForwardResult(0.0, 0.0), [2 * tensor for tensor in tensors]


async def broken(peer, message, tensors):
    raise ZeroDivisionError("a bug")


async def read_message(stream):
    kind, length = frames.decode_header(await stream.read_exactly(5))
    assert kind is FrameKind.MESSAGE
    return decode_message(await stream.read_exactly(length))[0]


def frame(message) -> bytes:
    return frames.encode_frame(FrameKind.MESSAGE, encode_message(message))


async def test_request_and_answer(server, client):
    server.serve("double", answering({Forward: double}))
    async with await client.open_channel(server.peer_id, "double") as channel:
        assert channel.peer_id == server.peer_id
        for _ in range(3):
            _, (answer,) = await channel.request(FORWARD, [torch.ones(5)], expect=ForwardResult)
            assert answer.sum() == 10


async def test_a_refused_request_is_not_the_end(server, client):
    server.serve("double", answering({Forward: double}))
    async with await client.open_channel(server.peer_id, "double") as channel:
        with pytest.raises(BadInput, match="nothing to double"):
            await channel.request(FORWARD, expect=ForwardResult)
        await channel.request(FORWARD, [torch.ones(5)], expect=ForwardResult)


async def test_a_message_the_service_does_not_know(server, client):
    server.serve("double", answering({Forward: double}))
    async with await client.open_channel(server.peer_id, "double") as channel:
        with pytest.raises(ProtocolError, match="GetInfo"):
            await channel.request(GetInfo(), expect=ForwardResult)


async def test_a_bug_in_a_service_is_told_without_details(server, client, caplog):
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
    opened = [await client.open_channel(server.peer_id, "node") for _ in range(limit)]
    with pytest.raises(PeerBusy):
        await client.open_channel(server.peer_id, "node")
    for channel in opened:
        await channel.close()
    await settle()
    assert server._server.num_streams == 0
    assert await client.ping(server.peer_id) >= 0


@pytest.mark.parametrize("key", [None, SwarmKey.generate()])
async def test_a_private_swarm_refuses_others(net, clock, key):
    private = NodeConfig(swarm_key=SwarmKey.generate())
    async with SwarmNode(private, engine=net.engine, clock=clock) as member:
        join = NodeConfig(initial_peers=await member.addresses(), swarm_key=key)
        with pytest.raises(AdmissionDenied) as caught:
            async with SwarmNode(join, engine=net.engine, clock=clock):
                pass
        assert "--swarm-key" in caught.value.hint


async def test_a_member_does_not_talk_to_a_peer_without_the_key(net, clock):
    """The answering side proves itself, too."""
    async with SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as stranger:
        config = NodeConfig(swarm_key=SwarmKey.generate())
        async with SwarmNode(config, engine=net.engine, clock=clock) as member:
            with pytest.raises(AdmissionDenied):
                await member.open_channel(stranger.peer_id, "node")


async def test_without_the_key_only_a_refusal_comes_back(net, clock):
    config = NodeConfig(swarm_key=SwarmKey.generate())
    async with SwarmNode(config, engine=net.engine, clock=clock) as member:
        async with SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as stranger:
            stream = await stranger.transport.open_stream(member.peer_id, STREAM_PROTOCOL, 1.0)
            stream.write(frame(Hello(PROTOCOL_VERSION, "node")) + frame(GetInfo()))
            answer = await read_message(stream)
            assert isinstance(answer, Refusal) and answer.code == "admission_denied"
            with pytest.raises(PeerUnreachable):
                await stream.read_exactly(1)


async def test_members_of_a_private_swarm(net, clock):
    key = SwarmKey.generate()
    async with SwarmNode(NodeConfig(swarm_key=key), engine=net.engine, clock=clock) as one:
        config = NodeConfig(swarm_key=key, initial_peers=await one.addresses())
        async with SwarmNode(config, engine=net.engine, clock=clock) as two:
            assert await two.ping(one.peer_id) >= 0
            assert await one.ping(two.peer_id) >= 0


async def test_versions_differ_at_the_answering_side(server, client, monkeypatch):
    monkeypatch.setattr(dispatcher, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    opening = asyncio.create_task(client.open_channel(server.peer_id, "node"))
    await asyncio.sleep(0)  # the newer hello is on its way
    monkeypatch.setattr(dispatcher, "PROTOCOL_VERSION", PROTOCOL_VERSION)
    with pytest.raises(VersionMismatch, match=f"{PROTOCOL_VERSION + 1}"):
        await opening


async def test_a_hello_of_a_version_we_cannot_read(server, client):
    stream = await client.transport.open_stream(server.peer_id, STREAM_PROTOCOL, 1.0)
    newer = PROTOCOL_VERSION + 1
    foreign = msgspec.msgpack.encode([["Hello", newer, {"new": "shape"}], [], "more"])
    stream.write(frames.encode_frame(FrameKind.MESSAGE, foreign))
    answer = await read_message(stream)
    assert isinstance(answer, Refusal) and answer.code == "version_mismatch"
    assert f"the other {newer}" in answer.message


async def test_versions_differ_at_the_opening_side(net, clock, client):
    """A newer peer that answers instead of refusing is noticed by the one who opened."""

    async def newer(stream):
        await read_message(stream)
        stream.write(frame(Welcome(PROTOCOL_VERSION + 1)))

    async with SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as node:
        await node.transport.serve(STREAM_PROTOCOL, newer)
        with pytest.raises(VersionMismatch):
            await client.open_channel(node.peer_id, "node")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frames.encode_header(FrameKind.MESSAGE, 200_000),
        frames.encode_frame(FrameKind.PING, b"12345678"),
        frame(KeepSession(RequestHeader(b"s" * 16, 0))),
        frames.encode_frame(FrameKind.MESSAGE, b"\xc1" * 20),
        frames.encode_frame(FrameKind.MESSAGE, b"\x91" * 10_000),
    ],
    ids=range(6),
)
async def test_a_stream_that_does_not_begin_with_a_greeting(server, client, data):
    stream = await client.transport.open_stream(server.peer_id, STREAM_PROTOCOL, 1.0)
    stream.write(data)
    answer = await read_message(stream)
    assert isinstance(answer, Refusal) and answer.code == "protocol"
    await settle()
    assert server._server.num_streams == 0
    assert await client.ping(server.peer_id) >= 0


async def test_a_stream_that_ends_before_it_says_anything(server, client):
    stream = await client.transport.open_stream(server.peer_id, STREAM_PROTOCOL, 1.0)
    stream.reset()
    await settle()
    assert server._server.num_streams == 0


async def test_a_peer_that_answers_nonsense(net, clock, client):
    async def odd(stream):
        stream.write(frame(GetInfo()))

    async with SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as node:
        await node.transport.serve(STREAM_PROTOCOL, odd)
        with pytest.raises(ProtocolError):
            await client.open_channel(node.peer_id, "node")


async def test_leaving_ends_services_that_wait(net, clock, client):
    ended = []

    async def waits(channel):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(channel.peer_id)

    async with SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as node:
        node.serve("waits", waits)
        channel = await client.open_channel(node.peer_id, "waits")
        await settle()
    assert ended == [client.peer_id]
    with pytest.raises(PeerUnreachable):
        await channel.receive()


async def test_a_service_learns_that_its_client_vanished(net, server, client):
    ended = asyncio.Event()

    async def session(channel):
        try:
            await channel.receive()
        finally:
            ended.set()

    server.serve("session", session)
    await client.open_channel(server.peer_id, "session")
    net.kill(client.peer_id)
    await asyncio.wait_for(ended.wait(), 1.0)
    await settle()
    assert server._server.num_streams == 0


async def test_silent_streams_keep_nobody_out(net, clock, server, client, monkeypatch):
    """Those that have said nothing make room, the oldest first."""
    monkeypatch.setattr(dispatcher, "_MAX_GREETING_STREAMS", 3)
    silent = []
    for _ in range(3):
        node = await SwarmNode(NodeConfig(), engine=net.engine, clock=clock).__aenter__()
        stream = await node.transport.open_stream(server.peer_id, STREAM_PROTOCOL, 1.0)
        silent.append((node, stream))
        await settle()
    assert await client.ping(server.peer_id) >= 0
    with pytest.raises(PeerUnreachable):
        await silent[0][1].read_exactly(1)
    assert len(server._server._greeting) == 2
    for node, _ in silent:
        await node.close()
    await settle()
    assert not server._server._greeting


async def test_who_floods_is_not_even_refused(server, client):
    """Over real networks refusals take a while; here those under way are counted by hand."""
    being_refused = 2 * server.config.limits.max_streams_per_peer
    server._server._open[client.peer_id] += being_refused
    with pytest.raises(PeerUnreachable):
        await client.ping(server.peer_id)
    server._server._open[client.peer_id] -= being_refused
    assert await client.ping(server.peer_id) >= 0


def test_the_words_of_a_peer_cannot_command_a_terminal():
    error = Refusal("bad_input", "a\x1b[2Jb", "c\x07").to_error("peer")
    assert isinstance(error, BadInput)
    assert (error.message, error.reported_hint) == ("a [2Jb", "c ")
    assert error.hint == BadInput.default_hint
