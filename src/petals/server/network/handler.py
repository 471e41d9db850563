"""What peers may ask of the blocks that a server has: sessions, passes, adapters, its state.

A channel belongs to one client; the client's sessions outlive it by their lease. A ``Conversation``
reads one channel, finds the session that a message names and starts what it asks for. It waits for
nothing but the client itself, so that a long request holds up no other one on its channel. A
request that is wrong is refused with a typed error and costs no other client anything. Knows no
scheduling, no other hops and no blocks' insides.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from petals.errors import (
    LengthExceeded,
    PeerBusy,
    PetalsError,
    ProtocolError,
    SessionClosed,
    SessionGap,
)
from petals.server.admission import validation
from petals.server.admission.adapter_store import AdapterStore
from petals.server.admission.kv_queue import CacheRequest, KVQueue
from petals.server.admission.offer import ServedModel
from petals.server.admission.validation import PeerByteBudget
from petals.server.compute.executor import Executor
from petals.server.config import ClientLimits
from petals.server.network.forwarding import StepForwarder
from petals.server.session.memory import SessionMemory
from petals.server.session.rows import Reservation
from petals.server.session.session import ClientChannel, Session, SessionKey
from petals.server.session.table import SessionTable
from petals.server.training.requests import Passes
from petals.swarm.background import BackgroundTasks
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId, ServerState, SessionId
from petals.wire.fields import MAX_ROPE_RUNS
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.messages import AnyMessage
from petals.wire.passes import AdapterKept, Backward, Forward, PutAdapter
from petals.wire.replies import Info, SessionEnded, SessionOpened
from petals.wire.requests import (
    BeginEpoch,
    CloseSession,
    GetInfo,
    KeepSession,
    OpenSession,
    ReplayPart,
    ReplayRequest,
    Step,
)

_MAX_REQUESTS = 128
"""Requests of one channel, beside those in sessions, that may be under way. The channel is not read
while there are as many, so a client that sends without end waits for its own credit.
"""

SessionWork = Step | ReplayPart | ReplayRequest
SessionNotice = BeginEpoch | KeepSession
SingleRequest = OpenSession | Forward | Backward | PutAdapter | GetInfo
AnswerSingle = Callable[[ClientChannel, SingleRequest, Sequence[Tensor]], Awaitable[None]]
"""Answers a request that is made in no session, on the client's channel; may raise PetalsError."""


class Conversation:
    """An async context manager around one channel."""

    def __init__(
        self,
        client: ClientChannel,
        sessions: SessionTable,
        forwarder: StepForwarder,
        answer: AnswerSingle,
    ) -> None:
        self._client = client
        self._sessions = sessions
        self._forwarder = forwarder
        self._answer = answer
        self._room = asyncio.Semaphore(_MAX_REQUESTS)
        self._tasks = BackgroundTasks()

    async def __aenter__(self) -> "Conversation":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # Steps go on: they belong to sessions, and a client that comes back asks for their results.
        await self._tasks.close()

    async def take(self, message: AnyMessage, tensors: Sequence[Tensor]) -> None:
        """Act on one message. Raises ProtocolError for one that is not for this service."""
        match message:
            case Step() | ReplayPart() | ReplayRequest():
                await self._work(message, tensors)
            case BeginEpoch() | KeepSession():
                await self._notice(message)
            case CloseSession():
                await self._close(message.header)
            case OpenSession() | Forward() | Backward() | PutAdapter() | GetInfo():
                await self._room.acquire()
                task = self._tasks.start(self._answer_or_refuse(message, tensors), "request")
                task.add_done_callback(lambda _: self._room.release())
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a server of blocks.")

    async def _work(self, message: SessionWork, tensors: Sequence[Tensor]) -> None:
        header = message.header
        try:
            session = self._find(header)
            if session.is_outdated(header):
                return
            if header.epoch > session.epoch:
                # BeginEpoch comes before the steps of its epoch on the same channel, so this step
                # cannot be early, as one that another server forwards can.
                raise SessionGap(
                    f"The session is in epoch {session.epoch}, the request in {header.epoch}.",
                    hint="Begin the epoch first.",
                )
            self._sessions.attach(session, self._client)
            if isinstance(message, ReplayRequest):
                self._forwarder.replay(session, message)
            else:
                self._forwarder.run(session, message, tensors)
        except PetalsError as error:
            await self._client.send(Refusal.of(error, header))

    async def _notice(self, message: SessionNotice) -> None:
        try:
            session = self._find(message.header)
        except SessionClosed as error:
            await self._client.send(SessionEnded(message.header, error.message))
            return
        if session.is_outdated(message.header):
            return
        self._sessions.attach(session, self._client)
        if isinstance(message, BeginEpoch):
            self._forwarder.begin_epoch(session, message)

    async def _close(self, header: RequestHeader) -> None:
        """In whatever epoch: an id stands for one reservation, and that one is not wanted any
        more.
        """
        session = self._sessions.get(self._key(header))
        if session is not None:
            await self._sessions.end(session)
        await self._client.send(SessionEnded(header, "closed"))

    async def _answer_or_refuse(self, message: SingleRequest, tensors: Sequence[Tensor]) -> None:
        try:
            await self._answer(self._client, message, tensors)
        except PetalsError as error:
            header = message.header if isinstance(message, OpenSession) else None
            await self._client.send(Refusal.of(error, header))

    def _find(self, header: RequestHeader) -> Session:
        """This client's session of that id. Raises SessionClosed."""
        session = self._sessions.get(self._key(header))
        if session is None:
            raise SessionClosed(
                "There is no such session here.",
                hint="It was closed, or its lease ran out; open a new one.",
            )
        return session

    def _key(self, header: RequestHeader) -> SessionKey:
        return SessionKey(self._client.peer_id, SessionId(header.session_id))


class BlocksService:
    """Serves one span to every peer that opens a channel; ``state`` is what it announces.

    Use it as an async context manager around serving.
    """

    def __init__(
        self,
        offer: ServedModel,
        executor: Executor,
        memory: SessionMemory,
        node: SwarmNode,
        limits: ClientLimits,
        failover: FailoverConfig,
    ) -> None:
        clock = node.clock
        self.state = ServerState.JOINING
        self.sessions = SessionTable(limits, failover, clock)
        self.adapters = AdapterStore(limits, clock)
        self.kv_queue = KVQueue(memory.pool, executor, clock)
        self._offer = offer
        self._executor = executor
        self._memory = memory
        self._clock = clock
        self._limits = limits
        self._failover = failover
        self._bytes = PeerByteBudget(limits.max_bytes_per_peer)
        replay_tokens = min(limits.replay_chunk_tokens, offer.max_step_tokens, MAX_ROPE_RUNS)
        self._forwarder = StepForwarder(self.sessions, self._bytes, node, failover, replay_tokens)
        self.serve_forwarded = self._forwarder.serve
        self._passes = Passes(
            offer, executor, self._bytes, self.adapters, limits.lease_seconds, clock
        )
        self._channels: set[Channel] = set()
        self._channel_numbers = itertools.count()
        self._tasks = BackgroundTasks()
        self._num_answering = 0
        self._closed = False

    async def __aenter__(self) -> "BlocksService":
        self._tasks.start(self._reap(), "freeing silent sessions")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        await self.sessions.end_all("The server has stopped.")
        await asyncio.gather(*(channel.close() for channel in self._channels))
        await self._forwarder.close()
        await self.sessions.close()
        await self._tasks.close()

    async def serve(self, channel: Channel) -> None:
        """Answer one channel of a client until it ends (a ``swarm.rpc.Service``).

        Raises PeerBusy once these blocks are served no more.
        """
        if self._closed:
            raise PeerBusy("This server is about to serve other blocks.", hint="Use another one.")
        number = next(self._channel_numbers)
        client = ClientChannel(channel, number, self._failover.send_seconds)
        conversation = Conversation(client, self.sessions, self._forwarder, self._answer)
        self._channels.add(channel)
        try:
            async with conversation:
                while True:
                    message, tensors = await channel.receive()
                    await conversation.take(message, tensors)
        finally:
            self._channels.discard(channel)

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._num_answering and self.sessions.is_idle and self._forwarder.is_idle

    async def check_integrity(self) -> bool:
        """Raise AssertionError if sessions, their memory and its budgets disagree.

        Returns whether the server was idle; it checks nothing otherwise.
        """
        sessions = list(self.sessions)
        if not self.is_idle:
            return False
        num_reserved = await self._executor.call(self._memory.check_pool)
        if not self.is_idle or sessions != list(self.sessions):
            return False  # what the compute thread has counted is of another moment
        self.sessions.check_integrity()
        self._memory.check_logs(sessions)
        if num_reserved != len(sessions):
            raise AssertionError(f"{num_reserved} reservations for {len(sessions)} sessions")
        kept_bytes = sum(session.prompt_bytes for session in sessions)
        if self._bytes.used_bytes != kept_bytes:
            raise AssertionError(f"{self._bytes.used_bytes} bytes counted, {kept_bytes} are kept")
        return True

    async def _reap(self) -> None:
        while True:
            await self._clock.sleep(self._limits.lease_seconds / self._failover.reaps_per_lease)
            self.adapters.drop_unused()
            self._passes.expire()
            await self.sessions.end_silent()
            if self._memory.is_checked:
                self._tasks.start(self._check_or_stop(), "check of integrity")

    async def _check_or_stop(self) -> None:
        """End the server if its books are wrong, so that a chaos run does not pass over it."""
        try:
            await self.check_integrity()
        except AssertionError as error:
            self._memory.failure = error
            # An order, after which the compute thread is idle again and finds the failure.
            self._executor.post(lambda: None)
            raise

    # -- requests that are made in no session

    async def _answer(
        self, client: ClientChannel, message: SingleRequest, tensors: Sequence[Tensor]
    ) -> None:
        self._num_answering += 1
        try:
            match message:
                case OpenSession():
                    await self._open(client, message, tensors)
                case Forward() | Backward():
                    await self._passes.serve(client.peer_id, message, tensors, client.send)
                case PutAdapter():
                    await self._put_adapter(client, message, tensors)
                case GetInfo():
                    await client.send(self._info())
        finally:
            self._num_answering -= 1

    async def _open(
        self, client: ClientChannel, message: OpenSession, tensors: Sequence[Tensor]
    ) -> None:
        """Reserve a session, or find the one that this very request has opened before.

        Raises PeerBusy (too many, or the server leaves), BadInput (an id that is taken), and what
        the checks and ``KVQueue.reserve`` raise.
        """
        key = SessionKey(client.peer_id, SessionId(message.header.session_id))
        with ExitStack() as held:
            num_bytes = sum(tensor.nbytes for tensor in tensors)
            held.enter_context(self._bytes.hold(client.peer_id, num_bytes))
            async with self.sessions.opening(key):
                session = self.sessions.get(key)
                if session is None:
                    session = await self._reserve(key, message, tensors, held)
                    self.sessions.add(session)
        session.check_repeated(message)
        if session.is_outdated(message.header):
            return
        self.sessions.attach(session, client)
        if message.next_peer is not None:
            self._forwarder.connect(PeerId(message.next_peer))
        max_length, lease_seconds = session.rows.limits.max_length, self._limits.lease_seconds
        await session.reply(SessionOpened(message.header, max_length, lease_seconds))

    async def _reserve(
        self, key: SessionKey, message: OpenSession, tensors: Sequence[Tensor], held: ExitStack
    ) -> Session:
        """A new session, which takes over all that is ``held``; nothing of it if this raises."""
        offer, peer, source = self._offer, key.peer_id, self._forked(key.peer_id, message)
        blocks = validation.check_request(offer, message)
        validation.check_size(offer, message.num_rows, message.max_length)
        validation.state_dtype(message.dtype)
        given = validation.session_prompts(offer, message, tensors)
        if self.state is not ServerState.ONLINE:
            raise PeerBusy(
                f"This server is {self.state}: it takes no new sessions.",
                hint="Use another server.",
            )
        adapter = held.enter_context(self.adapters.using(peer, message.adapter))
        prompts = None
        if given is not None:
            prompts = await self._executor.call_on_device(lambda device: device.put(given))
        timeout = min(message.alloc_timeout_seconds, self._limits.max_alloc_seconds)
        longest = max((message.max_length, *(message.fork_lengths if source else ())))
        room = CacheRequest(message.num_rows, longest, blocks)
        kv = await self.kv_queue.reserve(room, timeout)
        held.callback(self.kv_queue.release, kv)
        if self._closed:
            raise PeerBusy("This server has stopped.", hint="Use another server.")
        outputs = self._memory.logs.open(message.num_rows)
        if source is not None:
            held.callback(outputs.drop)
            await source.copy_to(kv, outputs, message.fork_lengths)
        reservation = Reservation(kv, outputs, prompts, adapter, held.pop_all())
        return Session(key, message, offer, reservation, self._executor, self._clock)

    def _forked(self, peer: PeerId, message: OpenSession) -> Session | None:
        """The session that a new one begins as a copy of. Raises SessionClosed, BadInput,
        LengthExceeded.
        """
        if message.fork_of is None:
            return None
        source = self.sessions.get(SessionKey(peer, SessionId(message.fork_of)))
        if source is None:
            raise SessionClosed(
                "There is no such session to fork here.", hint="Fill a new session."
            )
        source.check_fork(message)
        longest = max(message.fork_lengths, default=0)
        if message.max_length and longest > message.max_length:
            raise LengthExceeded(
                f"A fork begins with {longest} tokens, its max_length is {message.max_length}.",
                hint="Open it with a larger max_length.",
            )
        return source

    async def _put_adapter(
        self, client: ClientChannel, message: PutAdapter, tensors: Sequence[Tensor]
    ) -> None:
        """Keep an adapter for a client. Raises what the checks and ``AdapterStore.put`` raise."""
        peer, name = client.peer_id, message.adapter
        with self._bytes.hold(peer, sum(tensor.nbytes for tensor in tensors)):
            if not self.adapters.has(peer, name):
                adapter = validation.adapter_of(self._offer, message, tensors)
                self.adapters.check_size(adapter)
                placed = await self._executor.call_on_device(lambda d: d.put_adapter(adapter))
                self.adapters.put(peer, name, placed)
        await client.send(AdapterKept(name, self._limits.lease_seconds))

    def _info(self) -> Info:
        """How the server is right now."""
        offer, pool = self._offer, self._memory.pool
        return Info(
            model=offer.model,
            blocks=(offer.blocks.start, offer.blocks.end),
            state=self.state,
            hidden_size=offer.hidden_size,
            dtype=offer.dtype,
            max_length=offer.max_length,
            max_batch_tokens=offer.max_step_tokens,
            tokens_free=pool.block_tokens_free,
            num_sessions=len(self.sessions),
            queue_tokens=self._executor.waiting_tokens,
            step_seconds=self._executor.step_seconds,
            outbox_bytes_free=self._memory.logs.free_bytes,
            trains=not offer.no_training,
            num_tasks=len(asyncio.all_tasks()),
            kv_format=offer.kv_format,
            arithmetic=offer.arithmetic,
            kv_token_bytes=pool.layout.token_bytes(offer.blocks),
        )
