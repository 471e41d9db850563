"""One reservation of a client: its epoch, its channel, the requests under way, its rows.

Invariants, beside those of the rows (``rows``); ``Session.check_integrity`` asserts both while the
session is idle:

1. *One at a time.* Requests that read or change the rows do so one after the other, in the order in
   which they arrived (``_turn``).
2. *One epoch.* Only ``begin_epoch`` changes the epoch, together with the sources, and only upwards.
   A request counts if its epoch is the session's when its turn has come; a request that has waited
   while a newer epoch began is dropped, and so is a reply to it.
3. *Nothing outlives the session.* Closing it ends its tasks, drops its log and frees its KV memory.

Knows no streams, no other hops and no blocks' insides.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from petals.clock import Clock
from petals.errors import BadInput, PeerBusy, SessionClosed
from petals.server.admission import validation
from petals.server.admission.offer import ServedModel
from petals.server.compute.executor import Executor
from petals.server.compute.step_job import StepLimits
from petals.server.session.client_channel import ClientChannel, MakeReply
from petals.server.session.rows import CachedRows, Reservation, SessionTerms, StepOutput
from petals.swarm.background import BackgroundTasks
from petals.types import PeerId, SessionId
from petals.wire import messages
from petals.wire.header import RequestHeader
from petals.wire.requests import OpenSession, ReplayPart, ReplayRequest, Step

MAX_REQUESTS = 64
"""Steps and replays of one session that may be under way, sending included. A client has at most
one step more under way than its route has hops.
"""

MAX_REPLAYS = 4
"""Replays that one session may be sending. Each keeps the rows as they were when it was asked for,
and the budget of output logs does not count them.
"""

ReplayStream = AsyncGenerator[tuple[ReplayPart, tuple[Tensor, ...]], None]


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What a session is found by: its client, and the id that the client has drawn for it."""

    peer_id: PeerId
    session_id: SessionId

    def __str__(self) -> str:
        return f"{self.session_id.hex()[:8]} of …{self.peer_id[-6:]}"


class Session:
    """A client's sequences in the blocks that ``request`` names. ``close`` it.

    It is complete once it is made. Afterwards ``attach``, ``begin_epoch``, ``close`` and the
    requests change it, and nothing else.
    """

    def __init__(
        self,
        key: SessionKey,
        request: OpenSession,
        offer: ServedModel,
        reservation: Reservation,
        executor: Executor,
        clock: Clock,
    ) -> None:
        self.key = key
        self.max_length = request.max_length or offer.max_length
        self._request = _without_patience(request)
        self._reservation = reservation
        self._clock = clock
        self._offer = offer
        limits = StepLimits(offer.max_rows, self.max_length, offer.max_step_tokens)
        dtype = validation.state_dtype(request.dtype)
        terms = SessionTerms(key.peer_id, messages.span(request.blocks), dtype, limits, offer)
        self._rows = CachedRows(terms, reservation, executor)
        self._epoch = request.header.epoch
        self._sources = frozenset(request.sources)
        self._client: ClientChannel | None = None
        self._last_sign = clock.monotonic()
        self._turn = asyncio.Lock()
        self._tasks = BackgroundTasks()
        self._num_replays = 0
        self._is_closed = False

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def sources(self) -> frozenset[str]:
        """The peers, beside the client, whose steps count in this epoch."""
        return self._sources

    @property
    def rows(self) -> CachedRows:
        """What the session holds. To be read only: requests change it, one at a time."""
        return self._rows

    @property
    def prompt_bytes(self) -> int:
        """Bytes of deep prompts that the session keeps."""
        prompts = self._reservation.prompts
        return 0 if prompts is None else prompts.nbytes

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not len(self._tasks)

    @property
    def has_client(self) -> bool:
        """Whether the channel of the client is open."""
        return self._client is not None and self._client.is_open

    @property
    def silent_seconds(self) -> float:
        """Time (s) since the client's last sign of life; 0 while a request is under way."""
        return self._clock.monotonic() - self._last_sign if self.is_idle else 0.0

    def is_outdated(self, header: RequestHeader) -> bool:
        """Whether a newer epoch has begun since the request was made."""
        return header.epoch < self._epoch

    def check_repeated(self, request: OpenSession) -> None:
        """Raises BadInput unless ``request`` is the one that has opened this session."""
        if _without_patience(request) != self._request:
            raise BadInput(
                "There is a session of this id already, opened with other contents.",
                hint="Draw a new id for every reservation.",
            )

    def attach(self, client: ClientChannel) -> bool:
        """The client has given a sign of life on a channel: replies go there from now on.

        A client that has lost its channel opens a new one, and what it had sent on the old one may
        be read after that. So a channel that was opened earlier does not take over from one that is
        open. Returns whether the channel has changed.
        """
        self._touch()
        current = self._client
        if current is not None and (current is client or current.is_newer_than(client)):
            return False
        self._client = client
        return True

    def begin_epoch(self, epoch: int, sources: Sequence[str]) -> None:
        """Accept requests of ``epoch`` from now on, from the client and from ``sources``.

        Both change together, so that no request of the new epoch is accepted from a source of the
        old one. An older epoch changes nothing.
        """
        if epoch >= self._epoch:
            self._epoch, self._sources = epoch, frozenset(sources)

    async def reply(
        self, header: RequestHeader, make: MakeReply, tensors: Sequence[Tensor] = ()
    ) -> None:
        """Answer a request, unless a newer epoch has begun: its client does not wait for it.

        Raises RequestTooLarge.
        """
        if self._client is not None and not self.is_outdated(header):
            await self._client.reply(header, make, tensors)

    async def notify(self, make: MakeReply) -> None:
        """Send the client something that no request has asked for."""
        await self.reply(RequestHeader(self.key.session_id, self._epoch), make)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Run a request in a task that ends when the session is closed, not when a channel ends.

        Raises PeerBusy if too many requests are under way, SessionClosed.
        """
        if self._is_closed:
            work.close()
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        if len(self._tasks) >= MAX_REQUESTS:
            work.close()
            raise PeerBusy(
                f"{MAX_REQUESTS} requests of this session are under way.",
                hint="Wait for answers before sending more.",
            )
        task = self._tasks.start(work, name)
        task.add_done_callback(lambda _: self._touch())
        return task

    async def step(self, message: Step, tensors: Sequence[Tensor]) -> StepOutput | None:
        """Run a step, or repeat the answer of one that was run. None: a newer epoch has begun.

        tensors: hidden ``[sum(counts), H]``. Raises what ``CachedRows.step`` raises, BadInput.
        """
        hidden = validation.only_states(self._offer, tensors, sum(message.counts))
        async with self._turn:
            if self.is_outdated(message.header):
                return None
            return await self._rows.step(message, hidden)

    async def fill(self, part: ReplayPart, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Fill the rows with the next part of a replay. Returns the outputs to forward: none if
        keys and values came. None: the part is dropped (an older epoch or replay, a repetition).

        Raises what ``CachedRows.fill`` raises.
        """
        async with self._turn:
            if self.is_outdated(part.header):
                return None
            return await self._rows.fill(part, tensors)

    async def replay(
        self, request: ReplayRequest, max_tokens: int, max_kv_bytes: int
    ) -> ReplayStream:
        """The parts of a replay and their tensors; of at most ``max_tokens`` tokens each, and of at
        most ``max_kv_bytes`` of keys and values (but at least one token).

        The rows are those that stand when the turn of the request has come. Nothing if a newer
        epoch has begun. Raises PeerBusy and what ``CachedRows.source`` and ``read`` raise.
        """
        if self._num_replays >= MAX_REPLAYS:
            raise PeerBusy(
                f"{MAX_REPLAYS} replays of this session are under way.", hint="Wait for them."
            )
        self._num_replays += 1
        try:
            async with self._turn:
                if self.is_outdated(request.header):
                    return
                source = self._rows.source(request)
            if request.kv:
                token_bytes = max(1, self._rows.kv_token_bytes)
                max_tokens = min(max_tokens, max(1, max_kv_bytes // token_bytes))
            for part in source.parts(max_tokens):
                yield part, await self._rows.read(part, source)
        finally:
            self._num_replays -= 1

    async def finish(self, timeout_seconds: float) -> None:
        """Wait until no request is under way, for at most ``timeout_seconds``."""
        await self._tasks.wait(timeout_seconds)

    async def close(self) -> None:
        """End all requests and free the memory. Idempotent."""
        self._is_closed = True
        await self._tasks.close()
        self._rows.outputs.drop()
        self._reservation.release.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant does not hold. Call it while the session is idle."""
        if self._is_closed or not self.is_idle or self._turn.locked():
            raise AssertionError("a session that is closed or busy was checked")
        if self._epoch < self._request.header.epoch:
            raise AssertionError("the epoch has gone back")
        self._rows.check_integrity()

    def _touch(self) -> None:
        self._last_sign = self._clock.monotonic()


def _without_patience(request: OpenSession) -> OpenSession:
    """A request without what a repetition may change: how long to wait for free cache."""
    return msgspec.structs.replace(request, alloc_timeout_seconds=0.0)
