"""Streams that carry any bytes: what a peer may send that does not use our channels."""

import asyncio

import torch

from petals.errors import PeerUnreachable
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL
from petals.swarm.transport import Stream
from petals.types import PeerId
from petals.wire import frames, tensors
from petals.wire.fields import Message
from petals.wire.frames import PROTOCOL_VERSION, FrameKind, decode_message, encode_message
from petals.wire.handshake import Hello, Welcome
from petals.wire.services import BLOCKS_SERVICE


def encoded(message: Message, hidden: torch.Tensor | None = None) -> bytes:
    """A message and its tensor as frames."""
    if hidden is None:
        return frames.encode_frame(FrameKind.MESSAGE, encode_message(message))
    spec, data = tensors.encode(hidden)
    head = frames.encode_frame(FrameKind.MESSAGE, encode_message(message, (spec,)))
    return head + (frames.encode_frame(FrameKind.CHUNK, bytes(data)) if len(data) else b"")


async def read_message(stream: Stream) -> Message:
    """The next message, of no tensors. Raises PeerUnreachable at the end of the stream."""
    kind, length = frames.decode_header(await stream.read_exactly(frames.HEADER.size))
    payload = await stream.read_exactly(length)
    if kind is not FrameKind.MESSAGE:
        return await read_message(stream)
    message, specs = decode_message(payload)
    assert not specs
    return message


async def admitted_stream(node: SwarmNode, peer: PeerId) -> Stream:
    """A stream that the peer has admitted as a member's."""
    stream = await node.transport.open_stream(peer, STREAM_PROTOCOL, 5.0)
    ticket = node.admission.issue(peer, node.clock.now())
    stream.write(encoded(Hello(PROTOCOL_VERSION, BLOCKS_SERVICE, ticket)))
    assert isinstance(await read_message(stream), Welcome)
    return stream


async def messages_until_end(stream: Stream, seconds: float) -> list[Message]:
    """What the peer sends until it ends the stream, which it must within ``seconds``."""
    messages = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                messages.append(await read_message(stream))
    except PeerUnreachable:
        return messages
