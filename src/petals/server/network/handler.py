"""The door: what peers may ask of this server.

A channel belongs to one client; the client's sessions outlive it by their lease. Whatever a client
gets wrong is a typed refusal and costs nobody else anything. Knows no scheduling, no pages, no
other hops and no blocks' insides.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from petals.errors import (
    BadInput,
    PeerBusy,
    PetalsError,
    ProtocolError,
    SessionClosed,
)
from petals.logs import get_logger
from petals.server.admission import validation
from petals.server.admission.adapter_store import AdapterStore
from petals.server.admission.kv_queue import CacheRequest, Reservations
from petals.server.admission.offer import ServedModel
from petals.server.admission.peer_budget import ByteAllowance
from petals.server.compute.device import place_adapter, place_states
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import KVPool, SessionKV
from petals.server.compute.step_plan import StepLimits
from petals.server.config import ClientLimits
from petals.server.network.forwarding import ForwarderParts, StepForwarder
from petals.server.session.client_channel import ClientChannel
from petals.server.session.output_log import OutputLogBudget
from petals.server.session.session import Session, SessionKey
from petals.server.session.table import SessionTable
from petals.server.training.requests import Passes
from petals.swarm.background import BackgroundTasks
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId, ServerState, SessionId
from petals.wire import messages
from petals.wire.fields import WireBlocks
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage
from petals.wire.passes import AdapterKept, Backward, Forward, PutAdapter
from petals.wire.replies import Draining, Info, SessionEnded, SessionOpened
from petals.wire.requests import (
    BeginEpoch,
    CloseSession,
    GetInfo,
    KeepSession,
    OpenSession,
    ReplayRequest,
    Step,
)

logger = get_logger(__name__)

_REAPS_PER_LEASE = 4
_DRAIN_LOOK_SECONDS = 0.1


class BlocksService:
    """Serves one span to whoever opens a channel.

    Use it as an async context manager around serving.
    """

    def __init__(
        self,
        offer: ServedModel,
        executor: Executor,
        pool: KVPool,
        outboxes: OutputLogBudget,
        node: SwarmNode,
        config: ClientLimits,
    ) -> None:
        self.offer = offer
        self.config = config
        self.state = ServerState.JOINING
        self.executor = executor
        self.clock = node.clock
        self.tasks = BackgroundTasks()
        self.reservations = Reservations(pool, executor, self.clock)
        self.bytes = ByteAllowance(config.max_bytes_per_peer)
        self.adapters = AdapterStore(config, self.clock)
        self.sessions = SessionTable(config.lease_seconds, config.max_sessions_per_peer)
        self.ring = StepForwarder(
            ForwarderParts(
                offer=offer,
                sessions=self.sessions,
                executor=executor,
                bytes=self.bytes,
                node=node,
                chunk_tokens=min(config.replay_chunk_tokens, offer.max_step_tokens),
            )
        )
        self.passes = Passes(
            offer, executor, self.bytes, self.adapters, config.lease_seconds, self.clock
        )
        self._pool = pool
        self._outboxes = outboxes
        self._leaves_at: float | None = None
        self._channels: set[Channel] = set()
        self._closed = False

    async def __aenter__(self) -> "BlocksService":
        self.tasks.start(self._reap(), "freeing silent sessions")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        await self.end_sessions("The server has stopped.")
        await asyncio.gather(*(channel.close() for channel in self._channels))
        await self.ring.close()
        await self.tasks.close()

    async def serve(self, channel: Channel) -> None:
        """Answer one channel until it ends (a ``swarm.rpc.Service``).

        Raises PeerBusy once these blocks are served no more.
        """
        if self._closed:
            raise PeerBusy("This server is about to serve other blocks.", hint="Use another one.")
        self._channels.add(channel)
        try:
            async with _Conversation(self, channel) as conversation:
                while True:
                    message, tensors = await channel.receive()
                    await conversation.hear(message, tensors)
        finally:
            self._channels.discard(channel)

    def info(self) -> Info:
        """How we are right now."""
        offer = self.offer
        return Info(
            model=offer.model,
            blocks=(offer.blocks.start, offer.blocks.end),
            state=self.state,
            hidden_size=offer.hidden_size,
            dtype=offer.dtype,
            max_length=offer.max_length,
            max_batch_tokens=offer.max_step_tokens,
            tokens_free=self._pool.tokens_free * len(offer.blocks),
            num_sessions=len(self.sessions),
            queue_tokens=self.executor.waiting_tokens,
            step_seconds=self.executor.step_seconds,
            outbox_bytes_free=self._outboxes.free_bytes,
            trains=not offer.no_training,
            num_tasks=len(asyncio.all_tasks()),
            kv_format=offer.kv_format,
            page_bytes=self._pool.layout.token_bytes(offer.blocks),
        )

    async def drain(self, seconds: float) -> None:
        """Tell clients that we leave, and wait until their sessions are gone.

        At most ``seconds``, and not for sessions whose client has hung up.
        """
        self._leaves_at = self.clock.monotonic() + seconds
        for session in self.sessions:
            self.tell_leaving(session)
        while self.clock.monotonic() < self._leaves_at and any(
            session.is_heard for session in self.sessions
        ):
            await self.clock.sleep(_DRAIN_LOOK_SECONDS)

    def tell_leaving(self, session: Session) -> None:
        """Tell the client of a session that we leave, if we do."""
        if self._leaves_at is not None:
            seconds = max(0.0, self._leaves_at - self.clock.monotonic())
            word = Draining(session.key.session_id, seconds)
            self.tasks.start(session.tell(word), "saying that we leave")

    async def finish_steps(self, timeout_seconds: float) -> None:
        """Let steps that are under way end, for at most ``timeout_seconds``."""
        tasks = {task for session in self.sessions for task in session.tasks}
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_seconds)

    async def end_sessions(self, reason: str) -> None:
        """Close every session and tell its client why."""
        for session in self.sessions:
            await self.end(session, reason)

    async def end(self, session: Session, reason: str) -> None:
        """Close a session, free its memory and, with a reason, tell its client."""
        await self.sessions.end(session)
        if reason:
            await session.tell(SessionEnded(session.key.session_id, reason))

    async def open(self, peer: PeerId, message: OpenSession, tensors: Sequence[Tensor]) -> Session:
        """Reserve a session, or find the one that this very request has opened before.

        Raises PeerBusy (too many, or we are leaving) and what the checks and
        ``Reservations.reserve`` raise.
        """
        blocks = validation.check_request(self.offer, message)
        validation.check_size(self.offer, message.num_rows, message.max_length)
        validation.state_dtype(message.dtype)
        given = validation.session_prompts(self.offer, message, tensors)
        key = SessionKey(peer, SessionId(message.session_id), blocks)
        found = await self._existing(key, message.epoch)
        if found is not None:
            self.ring.reroute(found, message.epoch, message.sources)
            return found
        if self.state is not ServerState.ONLINE:
            raise PeerBusy(
                f"This server is {self.state}: it takes no new sessions.",
                hint="Use another server.",
            )
        timeout = min(message.alloc_timeout_seconds, self.config.max_alloc_seconds)
        room = CacheRequest(message.num_rows, message.max_length, blocks)
        with self.sessions.reserve_slot(peer), ExitStack() as held:
            adapter = held.enter_context(self.adapters.using(peer, message.adapter))
            prompts = None
            if given is not None:
                held.enter_context(self.bytes.hold(peer, given.nbytes))
                place = partial(place_states, states=given)
                prompts = await self.executor.at_place(place)
            kv = await self.reservations.reserve(room, timeout)
            held.callback(self.reservations.release, kv)
            # The same request may have come twice, and both have waited.
            if self.sessions.get(key) is None:
                session = self._new_session(key, kv, message)
                session.prompts, session.adapter = prompts, adapter
                session.held = held.pop_all()
                self.sessions.add(session)
        return self.sessions[key]

    def _new_session(self, key: SessionKey, kv: SessionKV, message: OpenSession) -> Session:
        offer = self.offer
        limits = StepLimits(
            max_rows=offer.max_rows,
            max_length=message.max_length or offer.max_length,
            max_step_tokens=offer.max_step_tokens,
        )
        memory = (kv, self._outboxes.open(message.num_rows))
        session = Session(key, memory, limits, validation.state_dtype(message.dtype), self.clock)
        session.epoch, session.sources = message.epoch, frozenset(message.sources)
        return session

    async def put_adapter(
        self, peer: PeerId, message: PutAdapter, tensors: Sequence[Tensor]
    ) -> AdapterKept:
        """Keep an adapter for a client. Raises what the checks and ``AdapterStore.put`` raise."""
        if not self.adapters.has(peer, message.adapter):
            adapter = validation.adapter_of(self.offer, message, tensors)
            self.adapters.check_size(adapter)
            placed = await self.executor.at_place(partial(place_adapter, adapter=adapter))
            self.adapters.put(peer, message.adapter, placed)
        return AdapterKept(message.adapter, self.config.lease_seconds)

    async def _existing(self, key: SessionKey, epoch: int) -> Session | None:
        session = self.sessions.get(key)
        if session is None:
            return None
        if epoch < session.epoch:
            raise SessionClosed("The session has a newer epoch.", hint="Open a new session.")
        if epoch > session.epoch:
            await self.end(session, "")
            return None
        return session

    async def _reap(self) -> None:
        while True:
            await self.clock.sleep(self.config.lease_seconds / _REAPS_PER_LEASE)
            self.adapters.drop_unused()
            self.passes.expire()
            for session in self.sessions.silent():
                logger.info("session %s is freed: its client fell silent", session.key)
                await self.end(session, "No sign of life for longer than the lease.")


class _Conversation:
    """One channel: which sessions speak over it, and what it has under way."""

    def __init__(self, service: BlocksService, channel: Channel) -> None:
        self._service = service
        self._channel = channel
        self._sink = ClientChannel(channel)
        self._sessions: dict[bytes, Session] = {}
        self._tasks = BackgroundTasks()

    async def __aenter__(self) -> "_Conversation":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # Steps go on: they belong to sessions, and a client that comes back asks for their results.
        await self._tasks.close()

    async def hear(self, message: AnyMessage, tensors: Sequence[Tensor]) -> None:
        """Act on one message. Raises ProtocolError for what nobody asks of this service."""
        match message:
            case Step():
                await self._on_step(message, tensors)
            case KeepSession():
                await self._keep(message)
            case BeginEpoch():
                await self._on_route(message)
            case ReplayRequest():
                await self._on_replay(message)
            case OpenSession():
                self._start(self._open(message, tensors))
            case CloseSession():
                await self._close(message.session_id)
            case Forward() | Backward():
                self._start(self._pass(message, tensors))
            case PutAdapter():
                self._start(self._put_adapter(message, tensors))
            case GetInfo():
                await self._sink.answer(self._service.info())
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a server of blocks.")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.start(work, "request")

    async def _open(self, message: OpenSession, tensors: Sequence[Tensor]) -> None:
        try:
            session = await self._service.open(self._channel.peer_id, message, tensors)
        except PetalsError as error:
            await self._sink.answer(Refusal.of(error))
            return
        self._attach(session)
        if message.onward is not None:
            self._service.ring.meet(PeerId(message.onward))
        limits, lease = session.limits, self._service.config.lease_seconds
        await self._sink.answer(SessionOpened(message.session_id, limits.max_length, lease))

    def _attach(self, session: Session) -> None:
        self._sessions[session.key.session_id] = session
        session.sink = self._sink
        session.touch()
        self._service.tell_leaving(session)

    def _find(
        self, session_id: bytes, *, epoch: int | None = None, blocks: WireBlocks | None = None
    ) -> Session:
        """This channel's session of that id, or one of the same client that lost its channel.

        What is said for an older ``epoch`` does not take it from the channel that it has.
        """
        session = self._sessions.get(session_id)
        if session is not None and not session.closed:
            return session
        found = self._service.sessions.find(self._channel.peer_id, session_id)
        if blocks is not None:
            found = [s for s in found if s.key.blocks == messages.span(blocks)]
        if not found:
            raise SessionClosed(
                "There is no such session here.",
                hint="It was closed, or its lease ran out; open a new one.",
            )
        if len(found) > 1:
            raise BadInput(
                "Several sessions of this client have the same id.",
                hint="Send OpenSession again to say which blocks this channel is about.",
            )
        (session,) = found
        if epoch is None or epoch >= session.epoch:
            self._attach(session)
        return session

    async def _on_step(self, message: Step, tensors: Sequence[Tensor]) -> None:
        try:
            session = self._find(message.session_id, epoch=message.epoch)
        except PetalsError as error:
            await self._sink.answer(Refusal.of(error, message.step_id))
            return
        session.touch()
        self._service.ring.begin(session, message, tensors)

    async def _on_replay(self, message: ReplayRequest) -> None:
        try:
            session = self._find(message.session_id, epoch=message.epoch)
        except PetalsError as error:
            await self._sink.answer(Refusal.of(error, message.step_id))
            return
        self._service.ring.replay(session, message)

    async def _on_route(self, message: BeginEpoch) -> None:
        session = await self._find_or_tell(message.session_id, epoch=message.epoch)
        if session is not None:
            self._service.ring.reroute(session, message.epoch, message.sources)

    async def _keep(self, message: KeepSession) -> None:
        session = await self._find_or_tell(message.session_id, blocks=message.blocks)
        if session is not None:
            session.touch()

    async def _find_or_tell(
        self, session_id: bytes, *, epoch: int | None = None, blocks: WireBlocks | None = None
    ) -> Session | None:
        """A session, or word to the client that there is none."""
        try:
            return self._find(session_id, epoch=epoch, blocks=blocks)
        except PetalsError as error:
            await self._sink.answer(SessionEnded(session_id, error.message))
            return None

    async def _pass(self, message: Forward | Backward, tensors: Sequence[Tensor]) -> None:
        try:
            answer = self._sink.answer
            await self._service.passes.serve(self._channel.peer_id, message, tensors, answer)
        except PetalsError as error:
            await self._sink.answer(Refusal.of(error))

    async def _put_adapter(self, message: PutAdapter, tensors: Sequence[Tensor]) -> None:
        peer = self._channel.peer_id
        try:
            with self._service.bytes.hold(peer, sum(tensor.nbytes for tensor in tensors)):
                kept = await self._service.put_adapter(peer, message, tensors)
        except PetalsError as error:
            await self._sink.answer(Refusal.of(error))
        else:
            await self._sink.answer(kept)

    async def _close(self, session_id: bytes) -> None:
        # Only what this channel opened or took up: its client may have begun the session anew.
        session = self._sessions.pop(session_id, None)
        if session is not None and not session.closed:
            await self._service.end(session, "")
        await self._sink.answer(SessionEnded(session_id, "closed"))
