"""A network of messages in virtual time, with every fault that a test asks for.

A stream delivers messages in order after the latency of its link; its end may come loudly (both
ends notice) or silently (only silence tells). What a test decides about one message (``on_send``)
comes on top: it is lost, comes twice, or comes behind later ones. A receiver that reads nothing
holds its senders up. Pings are not sent: a channel that waits knows whether its peer would have
answered them. The two ends of a stream are in ``channels``. Knows no sessions.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from petals.errors import PeerUnreachable
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.frames import encode_message
from support.simulation.story import Sent, Story
from support.simulation.virtual_time import VirtualClock

if TYPE_CHECKING:
    from support.simulation.channels import SimChannel, SimNode


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
        self._unnoticed: list[Callable[[], None]] = []

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
        for notice in self._unnoticed:
            notice()
        self._unnoticed.clear()
        self._cut.clear()
        self._stalled.clear()
        self._paused.clear()
        self._go_on()

    def break_streams(self, one: PeerId, other: PeerId) -> None:
        """All streams between two peers are reset; what was under way is lost."""
        for channel in list(self.channels):
            if {channel.outbound.source, channel.outbound.target} == {one, other}:
                channel.abort(PeerUnreachable("The stream was reset.", peer_id=channel.peer_id))

    def drop_streams(self, peer: PeerId) -> Callable[[], None]:
        """The streams of a peer are gone, and nothing says so to the other ends until they notice:
        when the function that is returned is called, at the latest when all links are healed.
        """
        self._note_obstacle(lambda source, target: peer in (source, target))
        others = [end.other for end in self.channels if end.outbound.source == peer]
        for other in others:
            other.outbound.swallow()
            other.inbound.swallow()
            other.other.abort(PeerUnreachable("The daemon has ended."))

        def notice() -> None:
            for other in others:
                other.abort(PeerUnreachable("The stream was reset.", peer_id=peer))

        self._unnoticed.append(notice)
        return notice

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
