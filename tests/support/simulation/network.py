"""A network of messages in virtual time, with every fault that a test asks for.

A stream delivers messages in order after the latency of its link; its end may come loudly (both
ends notice) or silently (only silence tells). What a test decides about one message (``on_send``)
comes on top: it is lost, comes twice, or comes behind later ones. A receiver that reads nothing
holds its senders up after ``WINDOW_MESSAGES`` messages. Pings are not sent: a channel that waits
knows whether its peer would have answered them. Knows no sessions.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from torch import Tensor

from petals.errors import PeerTimeout, PeerUnreachable, PetalsError, ProtocolError
from petals.swarm.background import BackgroundTasks
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.frames import decode_message, encode_message
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage
from support.simulation.story import Sent, Story
from support.simulation.virtual_time import VirtualClock

WINDOW_MESSAGES = 8
"""Messages that may be under way or unread on a stream before its sender has to wait."""

_CHECKS_PER_SILENCE = 3
_POLL_SECONDS = 0.05
"""Pause between two attempts to reach a peer that cannot be reached now."""

M = TypeVar("M", bound=Message)
SimService = Callable[["SimChannel"], Awaitable[None]]


class FateKind(Enum):
    """What may happen to one message. Only STALLED can happen on a real stream that goes on."""

    DELIVERED = "arrives"
    STALLED = "arrives late, and so does all that follows"
    LOST = "is lost"
    REPEATED = "arrives, and once more later"
    OVERTAKEN = "arrives late, behind others that were sent later"


@dataclass(frozen=True, slots=True)
class Fate:
    """seconds: how late the message, or its repetition, arrives."""

    kind: FateKind
    seconds: float = 0.0


_DELIVERED = Fate(FateKind.DELIVERED)


class SimNetwork:
    """All peers, and what lies between them.

    on_send: decides about every message; may strike peers and links before the message is sent.
    rewrite: changes what a peer sends. is_outdated: whether a message that reaches a peer is one
    that the peer must not act on; its tensors are spoilt then.
    """

    def __init__(self, story: Story) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self.loop)
        self.story = story
        self.nodes: dict[PeerId, SimNode] = {}
        self.num_sent = 0
        self.num_streams = 0
        self.latency_seconds: dict[tuple[PeerId, PeerId], float] = {}
        self.on_send: Callable[[Sent], Fate | None] = lambda sent: None
        self.rewrite: Callable[
            [PeerId, Message, Sequence[Tensor]], tuple[Message, Sequence[Tensor]]
        ] = lambda source, message, tensors: (message, tensors)
        self.is_outdated: Callable[[PeerId, Message], bool] = lambda target, message: False
        self.channels: dict[SimChannel, None] = {}
        self._paused: set[PeerId] = set()
        self._gone: set[PeerId] = set()
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._stalled: dict[tuple[PeerId, PeerId], float] = {}

    def now(self) -> float:
        return self.loop.time()

    def latency(self, source: PeerId, target: PeerId) -> float:
        return self.latency_seconds.get((source, target), 0.01)

    def is_held(self, source: PeerId, target: PeerId) -> bool:
        """True while one of the two stands still, or what lies between them does."""
        is_stalled = self._stalled.get((source, target), 0.0) > self.now()
        return is_stalled or source in self._paused or target in self._paused

    def is_cut(self, source: PeerId, target: PeerId) -> bool:
        """True while the link swallows all that is sent."""
        return (source, target) in self._cut

    def can_dial(self, source: PeerId, target: PeerId) -> bool:
        """True if a new stream would open now."""
        return target not in self._gone and not any(
            self.is_held(one, other) or self.is_cut(one, other)
            for one, other in ((source, target), (target, source))
        )

    def join(self, node: "SimNode") -> None:
        """A peer is there, perhaps again."""
        self.nodes[node.peer_id] = node
        self._gone.discard(node.peer_id)
        self._paused.discard(node.peer_id)

    # -- faults

    def pause(self, peer: PeerId) -> None:
        """The peer stands still, as far as others can see."""
        self._note_obstacle(lambda source, target: peer in (source, target))
        self._paused.add(peer)

    def resume(self, peer: PeerId) -> None:
        """What was held is delivered in order."""
        self._paused.discard(peer)
        self._go_on()

    def stall(self, source: PeerId, target: PeerId, seconds: float) -> None:
        """The link delivers nothing for ``seconds``, and then all."""
        self._note_obstacle(lambda *link: link == (source, target))
        self._stalled[source, target] = self.now() + seconds
        self.loop.call_later(seconds + 1e-6, self._go_on)

    def cut(self, source: PeerId, target: PeerId) -> None:
        """The link swallows everything; streams that lose a message stay broken."""
        self._note_obstacle(lambda *link: link == (source, target))
        self._cut.add((source, target))
        for channel in self.channels:
            pipe = channel.outbound
            if (pipe.source, pipe.target) == (source, target):
                pipe.swallow()

    def mend(self, source: PeerId, target: PeerId) -> None:
        """The link passes new streams again."""
        self._cut.discard((source, target))

    def heal(self) -> None:
        """All links pass everything and no peer stands still. Streams that lost messages stay
        broken.
        """
        self._cut.clear()
        self._stalled.clear()
        self._paused.clear()
        self._go_on()

    def break_streams(self, one: PeerId, other: PeerId) -> None:
        """All streams between two peers are reset; what was under way is lost."""
        for channel in list(self.channels):
            if {channel.outbound.source, channel.outbound.target} == {one, other}:
                channel.abort(PeerUnreachable("The stream was reset.", peer_id=channel.peer_id))

    def vanish(self, peer: PeerId, *, silently: bool) -> None:
        """A peer is gone. silently: its machine is, so nothing says that its streams have ended."""
        self.nodes.pop(peer, None)
        self._note_obstacle(lambda source, target: peer in (source, target))
        if silently:
            self._gone.add(peer)
        else:
            self._paused.discard(peer)
        for channel in list(self.channels):
            if silently and peer == channel.outbound.target:
                channel.inbound.swallow()
                channel.outbound.swallow()
        for channel in list(self.channels):
            if peer == channel.outbound.source:
                channel.end("The process has ended.")
        self._go_on()

    def _note_obstacle(self, concerns: Callable[[PeerId, PeerId], bool]) -> None:
        """Something is about to hold or swallow messages: channels look whether their peers live
        from now on.
        """
        for channel in self.channels:
            one, other = channel.outbound.source, channel.outbound.target
            if concerns(one, other) or concerns(other, one):
                channel.note_obstacle()

    def _go_on(self) -> None:
        for channel in list(self.channels):
            channel.outbound.go_on()

    # -- messages

    def transmit(self, pipe: "SimPipe", message: Message, tensors: Sequence[Tensor]) -> None:
        """Send a message on its way."""
        self.num_sent += 1
        sent = Sent(self.num_sent, self.now(), pipe.source, pipe.target, pipe.stream, message)
        self.story.note_sent(sent)
        fate = self.on_send(sent) or _DELIVERED
        message, tensors = self.rewrite(pipe.source, message, tensors)
        arrival = Arrival(encode_message(message), tuple(tensor.clone() for tensor in tensors))
        if fate.kind is not FateKind.DELIVERED:
            self.story.note(self.now(), "network", f"message {sent.number} {fate.kind.value}")
        if fate.kind is FateKind.STALLED:
            pipe.stall(fate.seconds)
        if fate.kind in (FateKind.OVERTAKEN, FateKind.REPEATED):
            pipe.deliver_apart(arrival, fate.seconds)
        if fate.kind not in (FateKind.OVERTAKEN, FateKind.LOST):
            pipe.put(arrival)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message in bytes, and its tensors."""

    payload: bytes
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The other end of a stream is closed."""


class SimPipe:
    """One direction of a stream: what was sent arrives in order."""

    def __init__(self, net: SimNetwork, source: PeerId, target: PeerId) -> None:
        self.source = source
        self.target = target
        self.stream = net.num_streams
        self.num_unread = 0
        self.receiver: SimChannel
        self._net = net
        self._items: deque[tuple[float, float, Arrival | StreamEnd]] = deque()
        self._stalled_until = 0.0
        self._is_broken = net.is_cut(source, target)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_flowing(self) -> bool:
        """True if a ping would pass now."""
        is_stalled = self._stalled_until > self._net.now()
        return not (self._is_broken or is_stalled or self._net.is_held(self.source, self.target))

    @property
    def arrived_until(self) -> float:
        """What was sent before this time has arrived."""
        return self._items[0][0] if self._items else self._net.now()

    def put(self, item: Arrival | StreamEnd) -> None:
        """Send an item behind all others."""
        self.num_unread += isinstance(item, Arrival)
        if not self._is_broken and not self._net.loop.is_closed():
            now = self._net.now()
            due = now + self._net.latency(self.source, self.target)
            self._items.append((now, due, item))
            self.go_on()

    def deliver_apart(self, item: Arrival, seconds: float) -> None:
        """Deliver a message in ``seconds``, whatever comes before and after it."""
        seconds += self._net.latency(self.source, self.target)
        self.num_unread += 1
        self._net.loop.call_later(seconds, self._deliver, item)

    def stall(self, seconds: float) -> None:
        """Deliver nothing for ``seconds``."""
        self.receiver.note_obstacle()
        self.receiver.other.note_obstacle()
        self._stalled_until = max(self._stalled_until, self._net.now() + seconds)

    def swallow(self) -> None:
        """Deliver nothing any more, and say nothing of it."""
        self._is_broken = True
        self._items.clear()

    def drop_items(self) -> None:
        """What is under way is lost."""
        self._items.clear()

    def go_on(self) -> None:
        """Deliver what is due, and come back for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._items and not self._net.is_held(self.source, self.target):
            due = max(self._items[0][1], self._stalled_until)
            if due > self._net.now():
                self._timer = self._net.loop.call_at(due, self.go_on)
                return
            self._deliver(self._items.popleft()[2])

    def _deliver(self, item: Arrival | StreamEnd) -> None:
        self.receiver.take(item)


class SimChannel:
    """One end of a stream, with the methods of ``swarm.rpc.Channel`` that sessions use."""

    rtt_seconds: float | None = None
    is_relayed = False

    def __init__(self, node: "SimNode", service: str, inbound: SimPipe, outbound: SimPipe) -> None:
        self.service = service
        self.silence_seconds = 3.0
        self.inbound = inbound
        self.outbound = outbound
        self.other: SimChannel
        self._node = node
        self._net = node.net
        self._inbox: deque[tuple[AnyMessage, list[Tensor]]] = deque()
        self._error: PetalsError | None = None
        self._sending = asyncio.Lock()
        self._waiters: list[asyncio.Future[None]] = []
        self._watch: asyncio.TimerHandle | None = None
        self._waits_since = self._heard_at = self._net.now()
        self._confirmed_at = 0.0
        inbound.receiver = self
        self._net.channels[self] = None

    @property
    def peer_id(self) -> PeerId:
        return self.outbound.target

    @property
    def is_closed(self) -> bool:
        return self._error is not None

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiters)

    @property
    def confirmed_at(self) -> float:
        """See ``Channel``. Pongs come from time to time, so it lags behind what has arrived."""
        if self.inbound.is_flowing and self.outbound.is_flowing and not self.is_closed:
            period = self.silence_seconds / _CHECKS_PER_SILENCE
            last_ping = self._net.now() // period * period
            self._confirmed_at = max(
                self._confirmed_at, min(last_ping, self.outbound.arrived_until)
            )
        return self._confirmed_at

    async def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """See ``Channel.send``."""
        async with self._sending:
            self._raise_if_closed()
            while self.outbound.num_unread >= WINDOW_MESSAGES:
                await self._wait()
                self._raise_if_closed()
            self._net.transmit(self.outbound, message, tensors)
            await asyncio.sleep(0)

    async def receive(self, timeout: float | None = None) -> tuple[AnyMessage, list[Tensor]]:
        """See ``Channel.receive``."""
        try:
            async with asyncio.timeout(timeout):
                while not self._inbox or self._node.is_deaf:
                    if not self._inbox:
                        self._raise_if_closed()
                    await self._wait()
        except TimeoutError:
            raise PeerTimeout(f"No answer within {timeout} s.", peer_id=self.peer_id) from None
        self.inbound.num_unread -= 1
        self.other.wake()
        return self._inbox.popleft()

    async def request(
        self,
        message: Message,
        tensors: Sequence[Tensor] = (),
        *,
        expect: type[M],
        timeout: float | None = None,
    ) -> tuple[M, list[Tensor]]:
        """See ``Channel.request``."""
        await self.send(message, tensors)
        answer, came = await self.receive(timeout)
        if isinstance(answer, expect):
            return answer, came
        if isinstance(answer, Refusal):
            raise answer.to_error(self.peer_id)
        error = ProtocolError(f"Expected {expect.__name__}, got {type(answer).__name__}.")
        self.abort(error)
        raise error

    async def ping(self, timeout: float = 5.0) -> float:
        """See ``Channel.ping``."""
        began, net = self._net.now(), self._net
        while True:
            self._raise_if_closed()
            if self.inbound.is_flowing and self.outbound.is_flowing:
                seconds = net.latency(self.outbound.source, self.peer_id) + net.latency(
                    self.peer_id, self.outbound.source
                )
                await net.clock.sleep(seconds)
                return net.now() - began
            if net.now() - began >= timeout:
                raise PeerTimeout(f"No answer within {timeout} s.", peer_id=self.peer_id)
            await net.clock.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """See ``Channel.close``."""
        if self._error is None:
            self.end("The channel was closed here.")
        self._inbox.clear()
        await asyncio.sleep(0)

    def end(self, why: str) -> None:
        """Close this end; the other one reads what was sent and then the end."""
        if self._error is None:
            self.outbound.put(StreamEnd())
            self._fail(PeerUnreachable(why))

    def abort(self, error: PetalsError) -> None:
        """See ``Channel.abort``: what is under way is lost."""
        if self._error is None:
            self.outbound.drop_items()
            self.inbound.drop_items()
            self.outbound.put(StreamEnd())
            self._fail(error)

    def take(self, item: Arrival | StreamEnd) -> None:
        """What the pipe delivers."""
        if self._error is not None:
            return
        self._heard_at = self._net.now()
        if isinstance(item, StreamEnd):
            self._fail(PeerUnreachable("The stream ended."))
            return
        try:
            message, _ = decode_message(item.payload)
        except ProtocolError as error:
            self.abort(error)
            return
        is_outdated = self._net.is_outdated(self.inbound.target, message)
        tensors = [tensor + 1 if is_outdated else tensor for tensor in item.tensors]
        self._inbox.append((message, tensors))
        self.wake()

    def wake(self) -> None:
        """Something has changed: let those who wait look."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def note_obstacle(self) -> None:
        """Until now the peer would have answered pings, unless it did not before."""
        _ = self.confirmed_at
        if self._is_peer_heard:
            self._heard_at = self._net.now()
        if self._watch is None and self.is_waiting and self._error is None:
            self._watch_silence()

    @property
    def _is_peer_heard(self) -> bool:
        """True if something of the peer would come: the answer to a ping, or a ping of its own."""
        answers = self.outbound.is_flowing or self.other.is_waiting
        return self.inbound.is_flowing and answers and not self.other.is_closed

    async def _wait(self) -> None:
        """Until something changes: a message, room to send, the end of the stream."""
        waiter = self._net.loop.create_future()
        if not self._waiters:
            self._waits_since = self._net.now()
        self._waiters.append(waiter)
        if self._watch is None and not self._is_peer_heard:
            self._watch_silence()
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def _watch_silence(self) -> None:
        seconds = self.silence_seconds / _CHECKS_PER_SILENCE
        self._watch = self._net.loop.call_later(seconds, self._check_silence)

    def _check_silence(self) -> None:
        self._watch = None
        if self._error is not None or not self.is_waiting:
            return
        if self._is_peer_heard:
            self._heard_at = self._net.now()
            return
        silent = self._net.now() - max(self._heard_at, self._waits_since)
        if silent >= self.silence_seconds:
            self.abort(PeerTimeout(f"No sign of life for {silent:.1f} s."))
            return
        self._watch_silence()

    def _raise_if_closed(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: PetalsError) -> None:
        if isinstance(error, PeerUnreachable) and self._inbox:
            last = self._inbox[-1][0]
            if isinstance(last, Refusal) and last.header is None:
                error = last.to_error(self.peer_id)
        error.peer_id = error.peer_id or self.peer_id
        self._error = error
        self._net.channels.pop(self, None)
        self.wake()


class SimNode:
    """A peer, with what sessions use of ``SwarmNode``.

    is_deaf: its services read nothing.
    """

    def __init__(self, net: SimNetwork, peer_id: PeerId, directory: object = None) -> None:
        self.net = net
        self.peer_id = peer_id
        self.clock = net.clock
        self.directory = directory
        self.background = BackgroundTasks()
        self.is_deaf = False
        self._services: dict[str, SimService] = {}
        self._serving: set[asyncio.Task[None]] = set()
        net.join(self)

    def serve(self, name: str, service: SimService) -> None:
        """Offer a service."""
        self._services[name] = service

    async def open_channel(self, peer: PeerId, service: str, timeout: float = 10.0) -> SimChannel:
        """See ``SwarmNode.open_channel``."""
        net, began = self.net, self.net.now()
        seconds = net.latency(self.peer_id, peer) + net.latency(peer, self.peer_id)
        await net.clock.sleep(min(seconds, timeout))
        while not net.can_dial(self.peer_id, peer):
            left = began + timeout - net.now()
            if left <= 0:
                raise PeerTimeout("The peer does not answer.", peer_id=peer)
            await net.clock.sleep(min(left, _POLL_SECONDS))
        target = net.nodes.get(peer)
        if target is None or net.nodes.get(self.peer_id) is not self:
            raise PeerUnreachable("The peer cannot be reached.", peer_id=peer)
        return self._connect(target, service)

    def leave(self) -> list["asyncio.Task[None]"]:
        """End what is served. Returns the tasks, which have been cancelled."""
        for task in self._serving:
            task.cancel()
        return list(self._serving)

    def _connect(self, target: "SimNode", service: str) -> SimChannel:
        net = self.net
        net.num_streams += 1
        forth = SimPipe(net, self.peer_id, target.peer_id)
        back = SimPipe(net, target.peer_id, self.peer_id)
        here = SimChannel(self, service, back, forth)
        there = SimChannel(target, service, forth, back)
        here.other, there.other = there, here
        target.accept(there)
        return here

    def accept(self, channel: SimChannel) -> None:
        """A stream has come in."""
        task = self.net.loop.create_task(self._serve(channel), name=f"serving {channel.peer_id}")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, channel: SimChannel) -> None:
        try:
            await self._services[channel.service](channel)
        except PeerUnreachable:
            pass
        except PetalsError as error:
            if not channel.is_closed:
                with contextlib.suppress(PetalsError):
                    await channel.send(Refusal.of(error))
        except Exception as error:
            context = {"message": f"serving {channel.peer_id} failed", "exception": error}
            self.net.loop.call_exception_handler(context)
        finally:
            channel.end("The service has ended.")
