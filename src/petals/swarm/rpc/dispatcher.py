"""From streams to typed services: the greeting, the dispatcher, request-and-answer services.

Every stream of Petals is opened for one protocol name; its first frame holds version, service and
ticket, and is answered by a refusal unless all three are accepted. A service is a coroutine that
owns a ``Channel``; ``answering`` makes one from a table of message types. Must not know what
services do.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from petals.clock import Clock
from petals.errors import (
    NotSupported,
    PeerBusy,
    PeerFailed,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    ProtocolError,
    VersionMismatch,
)
from petals.logs import get_logger
from petals.swarm.config import ChannelLimits
from petals.swarm.membership import Admission
from petals.swarm.rpc.channel import Channel
from petals.swarm.rpc.receive_buffer import Budget
from petals.swarm.transport import OPEN_TIMEOUT_SECONDS, Stream, Transport
from petals.types import PeerId
from petals.wire import frames
from petals.wire.fields import Message
from petals.wire.frames import PROTOCOL_VERSION, FrameKind, decode_message, encode_message
from petals.wire.handshake import Hello, Refusal, Welcome
from petals.wire.messages import AnyMessage

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

STREAM_PROTOCOL = "/petals/stream"
"""The engine's protocol name. It has no version, so that a peer of another version gets a typed
refusal.
"""

GREETING_TIMEOUT_SECONDS = 10.0
"""Time limit for the first frame of an inbound stream."""

_MAX_GREETING_STREAMS = 256
"""Inbound streams that have not greeted yet; the oldest is dropped for a new one."""

_MAX_GREETING_BYTES = 16 * 1024
"""Longest greeting."""


Service = Callable[[Channel], Coroutine[Any, Any, None]]
"""Owns a channel until it returns; an error it raises is sent to the peer as a Refusal."""

RpcReply = tuple[Message, "Sequence[Tensor]"]
Answerer = Callable[[PeerId, AnyMessage, "list[Tensor]"], Awaitable[RpcReply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcParts:
    """What both sides of a channel are built from."""

    admission: Admission
    limits: ChannelLimits
    budget: Budget
    clock: Clock
    agent: str = ""


async def open_channel(
    parts: RpcParts,
    transport: Transport,
    peer: PeerId,
    service: str,
    timeout: float = OPEN_TIMEOUT_SECONDS,
) -> Channel:
    """Open a stream to ``peer``, greet it, return the admitted channel.

    Raises PeerUnreachable, PeerTimeout, AdmissionDenied, VersionMismatch, ProtocolError, or what
    the peer refused with.
    """
    stream = await transport.open_stream(peer, STREAM_PROTOCOL, timeout)
    try:
        async with asyncio.timeout(timeout):
            ticket = parts.admission.issue(peer, parts.clock.now())
            hello = Hello(PROTOCOL_VERSION, service, ticket, parts.agent[:256])
            stream.write(frames.encode_frame(FrameKind.MESSAGE, encode_message(hello)))
            await stream.drain()
            await _expect_welcome(stream, parts)
    except TimeoutError:
        stream.reset()
        transport.doubt(peer)
        raise PeerTimeout(f"No greeting within {timeout:g} s.", peer_id=peer) from None
    except BaseException:
        stream.reset()
        raise
    return Channel(stream, service, parts.limits, parts.budget, parts.clock)


async def _expect_welcome(stream: Stream, parts: RpcParts) -> None:
    answer = await _read_greeting(stream)
    if isinstance(answer, Refusal):
        raise answer.to_error(stream.remote)
    if not isinstance(answer, Welcome):
        raise ProtocolError("The peer answered without a greeting.", peer_id=stream.remote)
    _check_version(answer.version, stream.remote)
    parts.admission.check_welcome(answer.ticket, stream.remote, parts.clock.now())


@dataclass(slots=True)
class RpcServer:
    """Admits streams and hands them to services by name."""

    parts: RpcParts
    services: dict[str, Service] = field(default_factory=dict)
    _open: Counter[PeerId] = field(default_factory=Counter)
    _tasks: set["asyncio.Task[Any] | None"] = field(default_factory=set)
    _greeting: dict[int, Stream] = field(default_factory=dict)

    def add(self, name: str, service: Service) -> None:
        """Serve streams opened for ``name``; replaces a service of that name."""
        self.services[name] = service

    @property
    def num_streams(self) -> int:
        return self._open.total()

    async def handle(self, stream: Stream) -> None:
        """The whole life of one inbound stream. Never raises: a task root."""
        peer, channel = stream.remote, None
        if not self._make_room(peer):
            stream.reset()
            return
        task = asyncio.current_task()
        self._open[peer] += 1
        self._tasks.add(task)
        try:
            self._greeting[id(stream)] = stream
            try:
                async with asyncio.timeout(GREETING_TIMEOUT_SECONDS):
                    name, service = await self._admit(stream, peer)
            finally:
                self._greeting.pop(id(stream), None)
            parts = self.parts
            channel = Channel(stream, name, parts.limits, parts.budget, parts.clock)
            # In a task of its own: a coroutine awaited here directly would be resumed through this
            # one for every message.
            await asyncio.create_task(service(channel), name=f"service {name}")
        except PeerUnreachable:
            logger.debug("%s closed its stream", peer)
        except TimeoutError:
            logger.debug("%s opened a stream and sent no greeting", peer)
        except PetalsError as error:
            logger.info("refused %s: %s", peer, error.message)
            await _refuse(stream, channel, error)
        except Exception:
            logger.exception("serving %s failed", peer)
            await _refuse(stream, channel, PeerFailed("The peer met an error of its own."))
        finally:
            self._tasks.discard(task)
            await (channel or stream).close()
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

    async def close(self) -> None:
        """End all services and their channels."""
        tasks = [task for task in self._tasks if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _make_room(self, peer: PeerId) -> bool:
        """Whether a stream is accepted at all: a refusal takes time, too, so that a peer with twice
        its number of streams gets none. Of the streams that have not greeted yet the oldest is
        dropped, so that silent streams keep no peer out.
        """
        limits = self.parts.limits
        if (
            self._open[peer] >= 2 * limits.max_streams_per_peer
            or self.num_streams >= 2 * limits.max_streams
        ):
            return False
        while len(self._greeting) >= _MAX_GREETING_STREAMS:
            self._greeting.pop(next(iter(self._greeting))).reset()
        return True

    async def _admit(self, stream: Stream, peer: PeerId) -> tuple[str, Service]:
        """Check the hello and answer it. Returns the service; raises the error to refuse with."""
        limits = self.parts.limits
        if self._open[peer] > limits.max_streams_per_peer or self.num_streams > limits.max_streams:
            raise PeerBusy("Too many streams are open to this peer.", hint="Close some first.")
        hello = await _read_greeting(stream)
        if not isinstance(hello, Hello):
            raise ProtocolError("The stream did not begin with a greeting.")
        _check_version(hello.version, peer)
        now = self.parts.clock.now()
        self.parts.admission.check(hello.ticket, peer, now)
        service = self.services.get(hello.service)
        if service is None:
            raise NotSupported(f"This peer does not offer the service {hello.service!r}.")
        ticket = self.parts.admission.issue(peer, now)
        welcome = Welcome(PROTOCOL_VERSION, self.parts.agent[:256], ticket)
        stream.write(frames.encode_frame(FrameKind.MESSAGE, encode_message(welcome)))
        await stream.drain()
        return hello.service, service


def answering(answerers: Mapping[type[Message], Answerer]) -> Service:
    """A service that answers messages one by one; a PetalsError is the answer to its request, not
    the end.

    Answerers get (peer, message, tensors) and return (message, tensors).
    """

    async def serve(channel: Channel) -> None:
        while True:
            message, received = await channel.receive()
            answerer = answerers.get(type(message))
            if answerer is None:
                raise ProtocolError(f"{type(message).__name__} is no request of {channel.service}.")
            try:
                answer, sent = await answerer(channel.peer_id, message, received)
            except PetalsError as error:
                answer, sent = Refusal.of(error), ()
            await channel.send(answer, sent)

    return serve


async def _read_greeting(stream: Stream) -> AnyMessage:
    """The first message of a stream. Raises VersionMismatch even for a hello we cannot read
    otherwise.
    """
    kind, length = frames.decode_header(await stream.read_exactly(frames.HEADER.size))
    if kind is not FrameKind.MESSAGE or length > _MAX_GREETING_BYTES:
        raise ProtocolError("The stream did not begin with a greeting.", peer_id=stream.remote)
    payload = await stream.read_exactly(length)
    try:
        message, specs = decode_message(payload)
    except ProtocolError:
        _check_version(_version_of(payload), stream.remote)
        raise
    if specs:
        raise ProtocolError("A greeting carries no tensors.", peer_id=stream.remote)
    return message


def _version_of(payload: bytes) -> int:
    """The version a foreign hello names; our own if it names none."""
    try:
        match msgspec.msgpack.decode(payload):
            case [["Hello" | "Welcome", int(version), *_], *_]:
                return version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return PROTOCOL_VERSION


def _check_version(version: int, peer: PeerId) -> None:
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"Protocol versions differ: one peer speaks {PROTOCOL_VERSION}, the other {version}.",
            hint=f"Update Petals where it speaks {min(version, PROTOCOL_VERSION)}.",
            peer_id=peer,
        )


async def _refuse(stream: Stream, channel: Channel | None, error: PetalsError) -> None:
    """Send the reason before the stream ends, if it can still be sent."""
    if channel is None:
        stream.write(frames.encode_frame(FrameKind.MESSAGE, encode_message(Refusal.of(error))))
    elif not channel.is_closed:
        with contextlib.suppress(PetalsError):
            await channel.send(Refusal.of(error))
