"""One channel of a client: finds the session that a message names and starts what it asks for.

A conversation waits for nothing but the client itself, so that a long request holds up no other one
on its channel. Knows no blocks and no memory.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from torch import Tensor

from petals.errors import PetalsError, ProtocolError, SessionClosed, SessionGap
from petals.server.network.forwarding import StepForwarder
from petals.server.session.client_channel import ClientChannel
from petals.server.session.session import Session, SessionKey
from petals.server.session.table import SessionTable
from petals.swarm.background import BackgroundTasks
from petals.types import SessionId
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.messages import AnyMessage
from petals.wire.passes import Backward, Forward, PutAdapter
from petals.wire.replies import SessionEnded
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
            await self._client.reply(header, partial(Refusal.of, error))

    async def _notice(self, message: SessionNotice) -> None:
        try:
            session = self._find(message.header)
        except SessionClosed as error:
            ended = partial(SessionEnded, reason=error.message)
            await self._client.reply(message.header, ended)
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
        await self._client.reply(header, partial(SessionEnded, reason="closed"))

    async def _answer_or_refuse(self, message: SingleRequest, tensors: Sequence[Tensor]) -> None:
        try:
            await self._answer(self._client, message, tensors)
        except PetalsError as error:
            if isinstance(message, OpenSession):
                await self._client.reply(message.header, partial(Refusal.of, error))
            else:
                await self._client.send(Refusal.of(error))

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
