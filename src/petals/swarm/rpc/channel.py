"""Typed messages with tensors over one stream.

A channel reads its stream all the time, so that pings are answered and a lost peer is noticed while
the owner computes; the bytes it holds unread are bounded by the credit it has granted. A send waits
for the peer's credit, up to its time limit, so a peer that stops reading delays its sender on this
stream only. While a caller waits for the peer, pings are sent; silence becomes PeerTimeout. Must
not know services, sessions and models.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from petals.clock import Clock, Timer, time_limit
from petals.errors import (
    PeerFailed,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    ProtocolError,
    RequestTooLarge,
)
from petals.logs import get_logger
from petals.swarm.address import Address
from petals.swarm.config import ChannelLimits
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES, Budget, Inbox, message_cost
from petals.swarm.transport import Stream
from petals.wire import frames
from petals.wire.fields import Message
from petals.wire.frames import FrameKind, TensorSpec, encode_message
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

_NONCE = struct.Struct("!Q")
_PARTING_SECONDS = 0.2
"""Time for the peer's last message, perhaps a refusal, to arrive after a write has failed."""

_PINGS_PER_SILENCE = 3
"""Pings sent within ``silence_seconds`` while something is pending."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Channel:
    """Both directions of an admitted stream; an async context manager, or call ``close``."""

    def __init__(
        self, stream: Stream, service: str, limits: ChannelLimits, budget: Budget, clock: Clock
    ) -> None:
        self.service = service
        self.address = Address(stream.remote_address)
        self.is_relayed = self.address.is_relayed
        """True if frames pass through a third peer's relay."""
        self.peer_id = stream.remote
        """The peer at the other end, proven by the engine's encryption."""
        self.limits = limits
        self.silence_seconds = limits.silence_seconds
        self.send_seconds = limits.send_seconds
        self._stream = stream
        self._clock = clock
        self._inbox = Inbox(stream.remote, limits, budget)
        self._credit = WINDOW_BYTES
        self._credit_waiters: deque[asyncio.Future[None]] = deque()
        self._receiver: asyncio.Future[None] | None = None
        self._pong_waiters: dict[int, asyncio.Future[float]] = {}
        self._last_nonce = 0
        self._sending = asyncio.Lock()
        self._num_pending = 0
        self._heartbeat: Timer | None = None
        self._pending_since = clock.monotonic()
        self.heard_at = self._pending_since
        """The clock's time (s, monotonic) at which the peer's last frame arrived."""
        self.confirmed_at = 0.0
        """What was sent before this time (s, monotonic) has reached the peer's channel."""
        self._error: PetalsError | None = None
        self._reader = asyncio.create_task(self._read(), name=f"channel {service}")
        self._reader.add_done_callback(self._on_reader_done)

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def is_closed(self) -> bool:
        """True once the stream has ended. Messages received before can still be read."""
        return self._error is not None

    async def send(
        self, message: Message, tensors_: "Sequence[Tensor]" = (), timeout: float | None = None
    ) -> None:
        """Send a message and its tensors; returns when the bytes are on their way, not when they
        arrive.

        Waits while the peer's window is full. The time limit, all waiting included, is
        ``send_seconds + num_bytes / min_bytes_per_second``, or ``timeout`` (s) if that is less.
        Raises PeerTimeout when it is over (the channel stays usable), RequestTooLarge,
        PeerUnreachable, ProtocolError, and PeerTimeout for a peer that is silent.
        """
        encoded = _encode_all(tensors_) if tensors_ else []
        payload = encode_message(message, tuple(spec for spec, _ in encoded))
        total = sum(len(data) for _, data in encoded)
        num_bytes = total + len(payload)
        if total > self.limits.max_tensor_bytes or len(payload) > frames.MAX_HEADER_BYTES:
            raise RequestTooLarge(
                f"A message of {num_bytes} bytes is more than one message may hold.",
                hint="Send fewer tokens or rows at a time.",
            )
        seconds = self.send_seconds + num_bytes / self.limits.min_bytes_per_second
        if timeout is not None:
            seconds = min(seconds, timeout)
        is_written = not self._sending.locked() and self._write_whole(payload, encoded, total)
        if is_written and self._stream.is_ready:
            return  # the usual case, once per token: nothing to wait for
        try:
            async with time_limit(self._clock, seconds), self._sending:
                if is_written or self._write_whole(payload, encoded, total):
                    await self._drain()
                else:
                    await self._send_in_chunks(payload, [data for _, data in encoded])
        except TimeoutError:
            raise PeerTimeout(
                f"The peer did not take {num_bytes} bytes within {seconds:g} s.",
                peer_id=self.peer_id,
            ) from None

    async def receive(self, timeout: float | None = None) -> "tuple[AnyMessage, list[Tensor]]":
        """The next message and its tensors, whatever it is (a Refusal too).

        Raises PeerTimeout after ``timeout`` seconds (the channel stays usable) or after
        ``silence_seconds`` without a sign of life (it does not), PeerUnreachable when the stream
        ends, ProtocolError for bytes out of order.
        """
        while not self._inbox.ready:
            self._raise_if_closed()
            await self._wait_for_message(timeout)
        received = self._inbox.pop()
        self._grant()
        return received.message, received.tensors

    async def request(
        self,
        message: Message,
        tensors_: "Sequence[Tensor]" = (),
        *,
        expect: type[M],
        timeout: float | None = None,
    ) -> "tuple[M, list[Tensor]]":
        """Send and wait for the answer, ``timeout`` seconds in all.

        A Refusal is raised as the typed error that it carries. Raises ProtocolError if the answer
        is of another type, and all that ``send`` and ``receive`` raise.
        """
        began = self._clock.monotonic()
        await self.send(message, tensors_, timeout)
        if timeout is not None:
            timeout = max(0.0, timeout - (self._clock.monotonic() - began))
        answer, answer_tensors = await self.receive(timeout)
        if isinstance(answer, expect):
            return answer, answer_tensors
        if isinstance(answer, Refusal):
            raise answer.to_error(self.peer_id)
        raise self._fail(ProtocolError(f"Expected {expect.__name__}, got {type(answer).__name__}."))

    async def ping(self, timeout: float = 5.0) -> float:
        """Round-trip time of one ping on this stream, in seconds. Raises PeerTimeout or
        PeerUnreachable.
        """
        self._raise_if_closed()
        waiter: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        nonce = self._write_ping()
        self._pong_waiters[nonce] = waiter
        timer = self._clock.call_later(timeout, lambda: _expire(waiter, timeout))
        try:
            return await waiter
        finally:
            timer.cancel()
            self._pong_waiters.pop(nonce, None)

    async def close(self) -> None:
        """Send what is queued and end the stream. Idempotent."""
        self._fail(PeerUnreachable("The channel was closed here."), reset=False)
        self._inbox.clear()
        await asyncio.wait({self._reader})
        await self._stream.close()

    def abort(self, error: PetalsError) -> None:
        """Drop the stream at once; every wait on it raises ``error``."""
        self._fail(error)

    # -- sending ----------------------------------------------------------------

    def _write_whole(
        self, payload: bytes, encoded: Sequence[tuple[TensorSpec, memoryview]], total: int
    ) -> bool:
        """Write a message and its tensors of ``total`` bytes at once; False if they are large or
        there is too little credit.
        """
        self._raise_if_closed()
        cost = message_cost(payload) + total
        if total > frames.CHUNK_BYTES or cost > self._credit:
            return False
        self._credit -= cost
        parts: list[bytes | memoryview] = [frames.encode_frame(FrameKind.MESSAGE, payload)]
        for _, data in encoded:
            if len(data):
                parts += (frames.encode_header(FrameKind.CHUNK, len(data)), data)
        self._stream.write(b"".join(parts))
        return True

    async def _send_in_chunks(self, payload: bytes, buffers: Sequence[memoryview]) -> None:
        step = frames.CHUNK_BYTES
        await self._take_credit(message_cost(payload))
        self._stream.write(frames.encode_frame(FrameKind.MESSAGE, payload))
        try:
            for data in buffers:
                for start in range(0, len(data), step):
                    chunk = data[start : start + step]
                    await self._take_credit(len(chunk))
                    self._stream.write(frames.encode_header(FrameKind.CHUNK, len(chunk)))
                    self._stream.write(chunk)
                    await self._drain()
        except asyncio.CancelledError:
            if self._error is None:
                self._stream.write(frames.encode_frame(FrameKind.CANCEL))
            raise

    async def _take_credit(self, num_bytes: int) -> None:
        while self._credit < num_bytes:
            self._raise_if_closed()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._credit_waiters.append(waiter)
            self._begin_waiting()
            try:
                await waiter
            finally:
                self._num_pending -= 1
        self._raise_if_closed()
        self._credit -= num_bytes

    async def _drain(self) -> None:
        self._begin_waiting()
        try:
            await self._stream.drain()
        except PetalsError as error:
            # The peer's last message, perhaps a refusal, may still be on its way to the reader.
            await asyncio.wait({self._reader}, timeout=_PARTING_SECONDS)
            raise self._fail(error) from None
        finally:
            self._num_pending -= 1

    # -- receiving ----------------------------------------------------------------

    async def _wait_for_message(self, timeout: float | None) -> None:
        if self._receiver is not None:
            raise RuntimeError("Two tasks receive on one channel.")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receiver = waiter
        self._grant()
        self._begin_waiting()
        timer = None
        if timeout is not None:
            timer = self._clock.call_later(timeout, partial(_expire, waiter, timeout))
        try:
            await waiter
        finally:
            self._receiver = None
            self._num_pending -= 1
            if timer is not None:
                timer.cancel()

    async def _read(self) -> None:
        stream = self._stream
        try:
            while True:
                kind, length = frames.decode_header(await stream.read_exactly(frames.HEADER.size))
                self._inbox.make_room(length)
                try:
                    payload = await stream.read_exactly(length) if length else b""
                finally:
                    self._inbox.arrived(length)
                self.heard_at = self._clock.monotonic()
                if kind is FrameKind.MESSAGE or kind is FrameKind.CHUNK:
                    self._on_data(kind, payload)
                elif kind is FrameKind.PING:
                    stream.write(frames.encode_frame(FrameKind.PONG, payload))
                    await stream.drain()
                else:
                    self._on_control(kind, payload)
        except PeerUnreachable as error:
            self._fail(error)
        except PetalsError as error:
            stream.write(frames.encode_frame(FrameKind.MESSAGE, encode_message(Refusal.of(error))))
            self._fail(error, reset=False)
            await stream.close()

    def _on_reader_done(self, reader: "asyncio.Task[None]") -> None:
        if not reader.cancelled() and reader.exception() is not None:
            logger.error("reading %s failed", self.service, exc_info=reader.exception())
            self._fail(PeerFailed("The stream could not be read."))

    def _on_data(self, kind: FrameKind, payload: bytes) -> None:
        if kind is FrameKind.MESSAGE:
            self._inbox.begin(payload)
        else:
            self._inbox.add_chunk(payload)
        if self._receiver is not None:
            if self._inbox.ready:
                _wake(self._receiver)
            else:
                self._grant()

    def _on_control(self, kind: FrameKind, payload: bytes) -> None:
        if kind is FrameKind.CREDIT:
            self._credit += frames.decode_credit(payload)
            if self._credit > WINDOW_BYTES:
                raise ProtocolError("The peer granted more credit than it can have.")
            while self._credit_waiters:
                _wake(self._credit_waiters.popleft())
        elif kind is FrameKind.PONG:
            self._on_pong(_NONCE.unpack(payload)[0])
        else:
            self._inbox.cancel()
            self._grant()

    def _on_pong(self, nonce: int) -> None:
        waiter = self._pong_waiters.pop(nonce, None)
        if waiter is None and nonce != self._last_nonce:
            return
        self.confirmed_at = max(self.confirmed_at, nonce / 1e9)
        if waiter is not None and not waiter.done():
            waiter.set_result(self._clock.monotonic() - nonce / 1e9)

    def _grant(self) -> None:
        """Grant credit for what was taken, in few frames: small messages cost none of their own."""
        num_bytes = self._inbox.take_grant(self._receiver is not None)
        if num_bytes and self._error is None:
            self._stream.write(frames.encode_credit(num_bytes))

    # -- life ----------------------------------------------------------------

    def _begin_waiting(self) -> None:
        if self._num_pending == 0:
            self._pending_since = self._clock.monotonic()
        self._num_pending += 1
        if self._heartbeat is None and self._error is None:
            self._watch(self.silence_seconds)

    def _check_pulse(self) -> None:
        self._heartbeat = None
        if self._error is not None or self._num_pending == 0:
            return
        now = self._clock.monotonic()
        silent = now - max(self.heard_at, self._pending_since)
        if silent >= self.silence_seconds:
            self._fail(PeerTimeout(f"No sign of life for {silent:.1f} s.", peer_id=self.peer_id))
            return
        self._write_ping()
        self._watch(self.silence_seconds - silent)

    def _watch(self, seconds_left: float) -> None:
        """Check again after a part of the silence that is allowed, or when none is left."""
        seconds = min(self.silence_seconds / _PINGS_PER_SILENCE, seconds_left)
        self._heartbeat = self._clock.call_later(seconds, self._check_pulse)

    def _write_ping(self) -> int:
        nonce = self._last_nonce = int(self._clock.monotonic() * 1e9)
        self._stream.write(frames.encode_frame(FrameKind.PING, _NONCE.pack(nonce)))
        return nonce

    def _raise_if_closed(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: PetalsError, reset: bool = True) -> PetalsError:
        """End the stream and every wait on it. Returns the error that ended it, the first one."""
        if self._error is not None:
            return self._error
        if isinstance(error, PeerUnreachable):
            error = self._inbox.parting_refusal() or error
        error.peer_id = error.peer_id or self.peer_id
        self._error = error
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._inbox.drop_partial()
        waiters: list[asyncio.Future[Any]] = [*self._credit_waiters, *self._pong_waiters.values()]
        if self._receiver is not None:
            waiters.append(self._receiver)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._credit_waiters.clear()
        if reset:
            self._stream.reset()
        if self._reader is not asyncio.current_task():
            self._reader.cancel()
        return error


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _expire(waiter: "asyncio.Future[T]", seconds: float) -> None:
    if not waiter.done():
        waiter.set_exception(PeerTimeout(f"No answer within {seconds:g} s."))


def _encode_all(tensors_: "Sequence[Tensor]") -> list[tuple[TensorSpec, memoryview]]:
    # Peers that send no tensors (petals status, bootstrap peers) start without torch.
    from petals.wire import tensors

    return [tensors.encode(tensor) for tensor in tensors_]
