"""Which request a reply answers: the only place where replies are matched.

A reply counts if its header (session id, epoch, request id) equals that of a request that is still
waited for, and the hop that it came from is the one that has this session id. Knows hops; knows no
routes and nothing of what replies mean.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.client.connection.tensor_checks import is_finite
from petals.client.session.hop import HopSession, ReplyMessage
from petals.errors import PetalsError
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.wire.header import RequestHeader
from petals.wire.replies import ForwardFailed
from petals.wire.requests import ReplayPart


@dataclass(frozen=True, slots=True)
class HopReply:
    """What a hop has answered; a loss of the hop and a refusal are errors."""

    hop: HopSession
    message: ReplyMessage | PetalsError
    tensors: Sequence[Tensor] = ()


@dataclass(slots=True)
class ReplayBuffer:
    """The parts of a replay that the client itself receives, at most ``max_tokens`` of width
    ``hidden_size``. They begin at ``starts`` (empty: position 0). reordered: the rows stand as the
    reorder of the step to follow leaves them.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    starts: tuple[int, ...] = ()
    reordered: bool = False
    num_rows: int = 0
    _log: TokenLog = field(default_factory=lambda: TokenLog(0))
    _num_parts: int = 0

    def add(self, part: ReplayPart, tensors: Sequence[Tensor]) -> str:
        """Take the next part. Returns what is wrong with it; empty if nothing is."""
        if not self._num_parts:
            self.num_rows = len(part.counts)
            self._log = TokenLog(self.num_rows)
        num_tokens, come = sum(part.counts), self._log.lengths
        starts = self.starts or (0,) * self.num_rows
        due = tuple(start + length for start, length in zip(starts, come))
        if part.index != self._num_parts or part.starts != due or len(part.counts) != len(due):
            return "rows that do not follow each other"
        if sum(come) + num_tokens > self.max_tokens:
            return "more rows than were asked for"
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [(num_tokens, self.hidden_size)] or tensors[0].dtype != self.dtype:
            return "rows of another shape"
        if not is_finite(tensors[0]):
            return "NaN or infinity"
        self._log.append(part.counts, tensors[0])
        self.reordered, self._num_parts = part.reordered, self._num_parts + 1
        return ""

    @property
    def rows(self) -> RowSlices | None:
        """What has come; None for nothing."""
        whole = self._log.whole()
        if whole is None or not self.starts:
            return whole
        return RowSlices(self.starts, whole.counts, whole.hidden)


class PendingReply:
    """A request whose answer may come from any of ``hops``.

    is_paced: ``limit`` may shorten the wait, since other pieces of the step have shown how long
    this one may take.
    """

    def __init__(self, hops: Sequence[HopSession], buffer: ReplayBuffer | None) -> None:
        self.hops = hops
        self.is_paced = False
        self._buffer = buffer
        self._reported: set[HopSession] = set()
        self._reply: asyncio.Future[HopReply] = asyncio.get_running_loop().create_future()
        self._began = 0.0
        self._limit: asyncio.Timeout | None = None

    async def receive(self, seconds: float, send: Callable[[], Awaitable[None]]) -> HopReply | None:
        """``send`` the request and return the reply; None after ``seconds`` for both."""
        loop = asyncio.get_running_loop()
        self._reply, self._began = loop.create_future(), loop.time()
        for hop in self.hops:
            self.changed(hop)
        try:
            async with asyncio.timeout(seconds) as self._limit:
                if not self._reply.done():
                    await send()
                return await self._reply
        except TimeoutError:
            return None
        finally:
            self._limit = None

    def limit(self, seconds: float) -> None:
        """Wait no longer than ``seconds`` in all."""
        if self.is_paced and self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._began + seconds)

    def take(self, reply: HopReply) -> None:
        """A reply to this request."""
        hop, message = reply.hop, reply.message
        if self._reply.done() or hop not in self.hops:
            return
        if isinstance(message, ForwardFailed):
            # Counts once for every hop: one that reports losses for ever would hold up the step.
            if hop in self._reported or hop is self.hops[-1]:
                return
            self._reported.add(hop)
        elif isinstance(message, ReplayPart):
            if self._buffer is None:
                return
            wrong = self._buffer.add(message, reply.tensors)
            if wrong:
                reply = HopReply(hop, hop.misbehaved(wrong))
            elif not message.ends:
                return
        self._reply.set_result(reply)

    def changed(self, hop: HopSession) -> None:
        """The state of ``hop`` has changed: if it is lost, that is the answer."""
        if hop.state.is_lost and hop.state.error is not None:
            self.take(HopReply(hop, hop.state.error))


class Replies:
    """All requests of one session that are waited for."""

    def __init__(self, on_draining: Callable[[HopSession], None]) -> None:
        self._waiting: dict[RequestHeader, tuple[HopSession, PendingReply]] = {}
        self._on_draining = on_draining

    @contextmanager
    def expect(
        self, hops: Sequence[HopSession], request_id: int, buffer: ReplayBuffer | None = None
    ) -> Iterator[PendingReply]:
        """Wait for answers to a request that passes ``hops``. ``buffer``: for rows sent to us."""
        pending = PendingReply(hops, buffer)
        headers = {hop.header(request_id): (hop, pending) for hop in hops}
        self._waiting.update(headers)
        try:
            yield pending
        finally:
            for header in headers:
                del self._waiting[header]

    def limit(self, seconds: float) -> None:
        """No paced request waits longer than ``seconds`` in all."""
        for _, pending in self._waiting.values():
            pending.limit(seconds)

    def take(self, reply: HopReply, header: RequestHeader) -> None:
        """Pass a reply on to the request that it answers; drop it if there is none."""
        hop, pending = self._waiting.get(header, (None, None))
        if pending is not None and hop is reply.hop:
            pending.take(reply)

    # What hops report (``hop.HopListener``)

    def on_reply(
        self,
        hop: HopSession,
        header: RequestHeader,
        message: ReplyMessage | PetalsError,
        tensors: Sequence[Tensor],
    ) -> None:
        """See ``HopListener``."""
        self.take(HopReply(hop, message, tensors), header)

    def on_change(self, hop: HopSession) -> None:
        """See ``HopListener``."""
        if not hop.state.is_lost:
            self._on_draining(hop)
        for _, pending in list(self._waiting.values()):
            if hop in pending.hops:
                pending.changed(hop)
