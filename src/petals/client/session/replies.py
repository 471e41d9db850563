"""Which request a reply answers: the only place where replies are matched.

A reply counts if its header (session id, epoch, request id) equals that of a request that is still
waited for; the session id names the hop. Knows nothing of what replies mean.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.errors import PetalsError
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.types import PeerId
from petals.wire.header import RequestHeader
from petals.wire.replies import ForwardFailed, ReplayDone, StepResult
from petals.wire.requests import ReplayPart
from petals.wire.tensors import is_finite

ReplyMessage = StepResult | ReplayDone | ReplayPart | ForwardFailed


@dataclass(frozen=True, slots=True)
class HopReply:
    """What the hop with this session id has answered; its loss, and a refusal, are errors."""

    session_id: bytes
    message: ReplyMessage | PetalsError
    tensors: Sequence[Tensor] = ()


@dataclass(slots=True)
class ReplayBuffer:
    """The parts of a replay that the client itself receives, at most ``max_tokens`` of width
    ``hidden_size``. They begin at ``starts`` (empty: position 0). reordered: the rows stand as the
    reorder of the step to follow leaves them. wrong: why a part cannot be right; empty: none is.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    starts: tuple[int, ...] = ()
    reordered: bool = False
    wrong: str = ""
    log: TokenLog = field(default_factory=lambda: TokenLog(0))
    _num_parts: int = 0

    def add(self, part: ReplayPart, tensors: Sequence[Tensor]) -> None:
        """Take the next part, unless it is wrong."""
        if not self._num_parts:
            self.log = TokenLog(len(part.counts))
            self.starts = self.starts or (0,) * len(part.counts)
        num_tokens, come = sum(part.counts), self.log.lengths
        due = tuple(start + length for start, length in zip(self.starts, come))
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if part.index != self._num_parts or part.starts != due or len(part.counts) != len(come):
            self.wrong = "rows that do not follow each other"
        elif sum(come) + num_tokens > self.max_tokens:
            self.wrong = "more rows than were asked for"
        elif shapes != [((num_tokens, self.hidden_size), self.dtype)]:
            self.wrong = "rows of another shape"
        elif not is_finite(tensors[0]):
            self.wrong = "NaN or infinity"
        else:
            self.log.append(part.counts, tensors[0])
            self.reordered, self._num_parts = part.reordered, self._num_parts + 1

    @property
    def rows(self) -> RowSlices | None:
        """What has come; None for nothing."""
        whole = self.log.whole()
        return None if whole is None else RowSlices(self.starts, whole.counts, whole.hidden)


class PendingReply:
    """A request whose answer may come from any of the hops with ``session_ids``.

    is_paced: ``limit`` may shorten the wait, since other pieces of the step have shown how long
    this one may take.
    """

    def __init__(self, session_ids: Sequence[bytes], buffer: ReplayBuffer | None) -> None:
        self.session_ids = session_ids
        self.is_paced = False
        self._buffer = buffer
        self._reported: set[bytes] = set()
        self._reply: asyncio.Future[HopReply] = asyncio.get_running_loop().create_future()
        self._began = 0.0
        self._limit: asyncio.Timeout | None = None

    async def receive(self, seconds: float, send: Callable[[], Awaitable[None]]) -> HopReply | None:
        """``send`` the request and return the reply; None after ``seconds`` for both."""
        loop = asyncio.get_running_loop()
        self._reply, self._began = loop.create_future(), loop.time()
        try:
            async with asyncio.timeout(seconds) as self._limit:
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
        if self._reply.done() or reply.session_id not in self.session_ids:
            return
        if isinstance(reply.message, ForwardFailed):
            # Counts once for every hop: one that reports losses for ever would hold up the step.
            if reply.session_id in self._reported or reply.session_id == self.session_ids[-1]:
                return
            self._reported.add(reply.session_id)
        elif isinstance(reply.message, ReplayPart) and self._buffer is not None:
            self._buffer.add(reply.message, reply.tensors)
            if not reply.message.ends and not self._buffer.wrong:
                return
        self._reply.set_result(reply)


class Replies:
    """All requests of one session that are waited for.

    on_draining: called with a peer that stops, and the seconds until then.
    """

    def __init__(self, on_draining: Callable[[PeerId, float], None]) -> None:
        self.on_draining = on_draining
        self._waiting: dict[RequestHeader, PendingReply] = {}

    @contextmanager
    def expect(
        self, headers: Sequence[RequestHeader], buffer: ReplayBuffer | None = None
    ) -> Iterator[PendingReply]:
        """Wait for answers to a request with these headers, one for every hop that it passes.
        ``buffer``: for rows that are sent to us.
        """
        pending = PendingReply([header.session_id for header in headers], buffer)
        self._waiting.update(dict.fromkeys(headers, pending))
        try:
            yield pending
        finally:
            for header in headers:
                del self._waiting[header]

    def take(
        self,
        header: RequestHeader,
        message: ReplyMessage | PetalsError,
        tensors: Sequence[Tensor] = (),
    ) -> None:
        """Pass a reply on to the request that it answers; drop it if there is none."""
        pending = self._waiting.get(header)
        if pending is not None:
            pending.take(HopReply(header.session_id, message, tensors))

    def lose(self, session_id: bytes, error: PetalsError) -> None:
        """A hop is lost: that answers all its requests."""
        for header, pending in list(self._waiting.items()):
            if header.session_id == session_id:
                pending.take(HopReply(session_id, error))

    def limit(self, seconds: float) -> None:
        """No paced request waits longer than ``seconds`` in all."""
        for pending in self._waiting.values():
            pending.limit(seconds)
