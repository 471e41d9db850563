"""One reservation of a client: its epoch, its channel, the requests under way, its rows.

Invariants, beside those of the rows (``rows``); ``Session.check_integrity`` asserts both while the
session is idle:

1. *One at a time.* Requests that read or change the rows do so one after the other, in the order in
   which they arrived (``_turn``).
2. *One epoch.* Only ``begin_epoch`` changes the epoch, together with the sources, and only upwards.
   A request counts if its epoch is the session's when its turn has come; a request that has waited
   while a newer epoch began is dropped, and so is a reply to it.
3. *Nothing outlives the session.* Closing it ends its tasks, drops its log and frees its KV memory.

Replies go through the ``ClientChannel`` on which the client was seen last. Knows no other hops and
no blocks' insides.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from petals.clock import Clock
from petals.errors import BadInput, PeerBusy, PeerError, PeerTimeout, SessionClosed
from petals.logs import get_logger
from petals.models.runtime.token_log import TokenLog
from petals.server.admission import validation
from petals.server.admission.offer import ServedModel
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import SessionKV
from petals.server.session.rows import CachedRows, Reservation, StepOutput
from petals.swarm.background import BackgroundTasks
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId, SessionId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.replies import (
    Draining,
    ForwardFailed,
    ReplayDone,
    SessionEnded,
    SessionOpened,
    StepResult,
)
from petals.wire.requests import OpenSession, ReplayPart, ReplayRequest, Step

logger = get_logger(__name__)

MAX_REQUESTS = 64
"""Steps and replays of one session that may be under way, sending included. A client has at most
one step more under way than its route has hops.
"""

MAX_REPLAYS = 4
"""Replays that one session may be sending. Each keeps the rows as they were when it was asked for,
and the budget of output logs does not count them.
"""

ReplayStream = AsyncGenerator[tuple[ReplayPart, tuple[Tensor, ...]], None]
Reply = (
    SessionOpened
    | StepResult
    | ReplayPart
    | ReplayDone
    | ForwardFailed
    | Draining
    | SessionEnded
    | Refusal
)
"""What a server sends to a client in a session. It carries the header of the request."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What a session is found by: its client, and the id that the client has drawn for it."""

    peer_id: PeerId
    session_id: SessionId

    def __str__(self) -> str:
        return f"{self.session_id.hex()[:8]} of …{self.peer_id[-6:]}"


class ClientChannel:
    """One channel of a client. ``number``: how many channels the server accepted before it.
    ``send_seconds``: base of the time limit of a message, see ``Channel.send``.

    No method raises because the client is gone: the client's sessions wait for it to come back. A
    client that does not take a message in time loses the channel, so that it cannot hold a step or
    the memory of its answer.
    """

    def __init__(self, channel: Channel, number: int, send_seconds: float) -> None:
        self._number = number
        self._channel = channel
        channel.send_seconds = send_seconds
        # The time limit of a message counts from the moment when the messages before it are sent.
        self._in_order = asyncio.Lock()

    @property
    def peer_id(self) -> PeerId:
        return self._channel.peer_id

    @property
    def is_open(self) -> bool:
        return not self._channel.is_closed

    def is_newer_than(self, other: "ClientChannel") -> bool:
        """Whether this channel is open and was opened after ``other``."""
        return self.is_open and self._number > other._number

    async def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Raises RequestTooLarge."""
        try:
            async with self._in_order:
                await self._channel.send(message, tensors)
        except PeerTimeout as error:
            # The channel ends, not only the message: what is sent on a channel arrives completely
            # and in order, or the client sees that the channel has ended.
            self._channel.abort(error)
        except PeerError as error:
            logger.debug("%s did not reach its client: %s", type(message).__name__, error.message)


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
        self._request = _without_patience(request)
        self._reservation = reservation
        self._clock = clock
        self._offer = offer
        self.rows = CachedRows(key.peer_id, request, offer, reservation, executor)
        """What the session holds. To be read only: requests change it, one at a time."""
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

    async def reply(self, reply: Reply, tensors: Sequence[Tensor] = ()) -> None:
        """Answer a request, unless a newer epoch has begun: its client does not wait for it.

        Raises RequestTooLarge.
        """
        is_outdated = reply.header is not None and self.is_outdated(reply.header)
        if self._client is not None and not is_outdated:
            await self._client.send(reply, tensors)

    async def notify(self, make: Callable[[RequestHeader], Draining | SessionEnded]) -> None:
        """Send the client something that no request has asked for, in the epoch of now."""
        await self.reply(make(RequestHeader(self.key.session_id, self._epoch)))

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
        """Run a step, or repeat the answer of one that was run. None: a newer epoch has begun,
        before the step's turn or while it ran; the output belongs to no next hop any more.

        tensors: hidden ``[sum(counts), H]``. Raises what ``CachedRows.step`` raises, BadInput.
        """
        hidden = validation.only_states(self._offer, tensors, sum(message.counts))
        async with self._turn:
            if self.is_outdated(message.header):
                return None
            output = await self.rows.step(message, hidden)
        return None if self.is_outdated(message.header) else output

    async def fill(self, part: ReplayPart, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Fill the rows with the next part of a replay. Returns the outputs to forward: none if
        keys and values came. None: the part is dropped (an older epoch or replay, a repetition).

        Raises what ``CachedRows.fill`` raises.
        """
        async with self._turn:
            if self.is_outdated(part.header):
                return None
            outputs = await self.rows.fill(part, tensors)
        return None if self.is_outdated(part.header) else outputs

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
                source = self.rows.source(request)
            if request.kv:
                token_bytes = max(1, self.rows.kv_token_bytes)
                max_tokens = min(max_tokens, max(1, max_kv_bytes // token_bytes))
            for part in source.parts(max_tokens):
                yield await self.rows.read(part, source)
        finally:
            self._num_replays -= 1

    def check_fork(self, request: OpenSession) -> None:
        """Raises BadInput unless ``request`` opens a session that can begin with these rows."""
        own = self._request
        pairs = (
            (request.blocks, own.blocks),
            (request.dtype, own.dtype),
            (request.adapter, own.adapter),
            (request.num_prompt_tokens, own.num_prompt_tokens),
            (request.num_rows, len(request.fork_lengths)),
        )
        if any(asked != has for asked, has in pairs):
            raise BadInput(
                "A fork was asked for with other blocks, dtype, adapter, prompts or rows.",
                hint="Open it like the session that it continues.",
            )

    async def copy_to(self, kv: SessionKV, outputs: TokenLog, lengths: tuple[int, ...]) -> None:
        """Let a new session begin with these rows, as they are when the turn of the request has
        come. Raises what ``CachedRows.copy_to`` raises.
        """
        async with self._turn:
            await self.rows.copy_to(kv, outputs, lengths)

    async def finish(self, timeout_seconds: float) -> None:
        """Wait until no request is under way, for at most ``timeout_seconds``."""
        await self._tasks.wait(timeout_seconds)

    async def close(self) -> None:
        """End all requests and free the memory. Idempotent."""
        self._is_closed = True
        await self._tasks.close()
        self.rows.outputs.drop()
        self._reservation.release.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant does not hold. Call it while the session is idle."""
        if self._is_closed or not self.is_idle or self._turn.locked():
            raise AssertionError("a session that is closed or busy was checked")
        if self._epoch < self._request.header.epoch:
            raise AssertionError("the epoch has gone back")
        self.rows.check_integrity()

    def _touch(self) -> None:
        self._last_sign = self._clock.monotonic()


def _without_patience(request: OpenSession) -> OpenSession:
    """A request without what a repetition may change: how long to wait for free cache."""
    return msgspec.structs.replace(request, alloc_timeout_seconds=0.0)
