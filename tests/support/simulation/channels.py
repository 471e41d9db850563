"""The ends of simulated streams, and the peers that open and serve them.

``SimChannel`` and ``SimNode`` have what sessions use of ``Channel`` and ``SwarmNode``. Knows no
sessions.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from torch import Tensor

from petals.errors import PeerTimeout, PeerUnreachable, PetalsError, ProtocolError
from petals.swarm.background import BackgroundTasks
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.frames import decode_message
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage
from support.simulation.network import Arrival, SimNetwork, SimPipe, StreamEnd

WINDOW_MESSAGES = 8
"""Messages that may be under way or unread on a stream before its sender has to wait."""

_CHECKS_PER_SILENCE = 3
_POLL_SECONDS = 0.05
"""Pause between two attempts to reach a peer that cannot be reached now."""

M = TypeVar("M", bound=Message)
SimService = Callable[["SimChannel"], Awaitable[None]]


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
