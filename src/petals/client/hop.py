"""One server's leg of a session: open, send steps, hear what comes back, close.

A single task reads the channel and passes answers on by step id; a channel that ends, or a server
that drops the session, marks the leg as lost. What comes back is checked (session, epoch, shape,
dtype, finite) before anybody uses it. Decides nothing: repairs and other routes are its caller's.
Knows no model and no tokens.
"""

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from petals.client.trace import HopTrace, StepTiming
from petals.errors import (
    BadInput,
    PeerError,
    PeerMisbehaved,
    PetalsError,
    ProtocolError,
    RequestError,
    SessionClosed,
    SessionError,
)
from petals.swarm.channel import Channel
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, Hop, PeerId, SessionId
from petals.wire.messages import (
    AnyMessage,
    CloseSession,
    GetInfo,
    Info,
    KeepSession,
    OpenSession,
    Refusal,
    SessionEnded,
    SessionOpened,
    Step,
    StepResult,
)

BLOCKS_SERVICE = "blocks"

_CLOSE_SECONDS = 2.0
_KEPT_TIMINGS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a session asks of every one of its hops."""

    session_id: SessionId
    model: str
    num_rows: int
    max_length: int | None
    """None: whatever the server allows, room taken as the rows grow."""
    dtype: torch.dtype = torch.float32
    adapter: str | None = None
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a stream, for one answer, for room in the server's cache; how often a
    server must give a sign of life, and for how long it may be silent.
    """

    connect_seconds: float
    request_seconds: float
    alloc_seconds: float = 0.0
    ping_seconds: float = 1.0
    silence_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class StepCall:
    """One step as every hop gets it: row r runs ``counts[r]`` tokens from ``starts[r]``."""

    step_id: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    reorder: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a hop said to a step."""

    result: StepResult
    tensors: list[Tensor]


class Listener(Protocol):
    """Who wants to know what a hop says."""

    def on_answer(self, hop: "HopSession", step_id: int, answer: Answer | PetalsError) -> None:
        """A result or a refusal."""
        ...

    def on_lost(self, hop: "HopSession") -> None:
        """``hop.failure`` says why nothing more will come."""
        ...


class HopSession:
    """A reservation at one server. ``open`` makes one; ``close`` frees what it holds there."""

    def __init__(self, channel: Channel, hop: Hop, terms: Terms, patience: Patience) -> None:
        self.hop = hop
        self.terms = terms
        self.epoch = terms.epoch
        self.lease_seconds = 0.0
        self.max_length = terms.max_length or 0
        self.timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self.failure: PetalsError | None = None
        """Why this leg is lost; None while it stands."""
        self.listener: Listener | None = None
        self._channel = channel
        self._patience = patience
        self._ended = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @property
    def peer_id(self) -> PeerId:
        return self.hop.peer_id

    @property
    def blocks(self) -> BlockSpan:
        return self.hop.blocks

    @property
    def trace(self) -> HopTrace:
        """The timings kept so far."""
        return HopTrace(self.peer_id, self.blocks, tuple(self.timings))

    @classmethod
    async def open(
        cls, node: SwarmNode, hop: Hop, terms: Terms, patience: Patience
    ) -> "HopSession":
        """Reserve room at ``hop``. Raises the server's refusal or a PeerError, nothing held."""
        channel = await node.open_channel(hop.peer_id, BLOCKS_SERVICE, patience.connect_seconds)
        channel.ping_interval_seconds = patience.ping_seconds
        channel.silence_seconds = patience.silence_seconds
        session = cls(channel, hop, terms, patience)
        try:
            await session._reserve()
        except (RequestError, SessionError):
            await channel.close()
            raise
        except BaseException:
            await session.close()
            raise
        session._reader = asyncio.create_task(session._read(), name="answers of a hop")
        return session

    async def send(self, call: StepCall, hidden: Tensor) -> None:
        """Ask for a step; the listener hears the answer. hidden: [sum(counts), H].

        Raises RequestTooLarge; a server that cannot be reached is a lost hop.
        """
        message = Step(
            session_id=self.terms.session_id,
            epoch=self.epoch,
            step_id=call.step_id,
            starts=call.starts,
            counts=call.counts,
            reorder=call.reorder,
        )
        try:
            await self._channel.send(message, (hidden,))
        except PeerError as error:
            self.fail(error)

    async def keep(self) -> None:
        """A sign of life, so that the lease begins anew."""
        with contextlib.suppress(PeerError):  # the reader meets it, too, and says so
            await self._channel.send(KeepSession(self.terms.session_id))

    def fail(self, error: PetalsError) -> None:
        """The leg is lost; whoever listens is told, once."""
        if self.failure is not None:
            return
        error.peer_id = error.peer_id or self.peer_id
        self.failure = error
        self._ended.set()
        if self.listener is not None:
            self.listener.on_lost(self)

    async def close(self) -> None:
        """Free the reservation and wait, briefly, for the server to say so. Raises nothing."""
        try:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._say_goodbye()
        finally:
            self.fail(SessionClosed("The session was closed.", hint="Open a new one."))
            if self._reader is not None:
                self._reader.cancel()
                await asyncio.wait({self._reader})
            await self._channel.close()

    def checked(self, answer: Answer, hidden: Tensor) -> Tensor:
        """The output, if it can be one for ``hidden``. Raises PeerMisbehaved."""
        if len(answer.tensors) != 1:
            raise self.misbehaved(f"{len(answer.tensors)} tensors instead of one")
        output = answer.tensors[0]
        if output.shape != hidden.shape or output.dtype != hidden.dtype:
            raise self.misbehaved(
                f"{output.dtype} {list(output.shape)} for {hidden.dtype} {list(hidden.shape)}"
            )
        if not is_finite(output):
            raise self.misbehaved("NaN or infinity")
        return output

    def misbehaved(self, what: str) -> PeerMisbehaved:
        """The error for an answer that cannot be right."""
        return PeerMisbehaved(
            f"The server of blocks {self.blocks} answered with {what}.",
            hint="It is avoided from now on; report it to whoever runs the swarm.",
            peer_id=self.peer_id,
        )

    async def _say_goodbye(self) -> None:
        if self._channel.is_closed:
            return
        is_heard = self._reader is not None and self.failure is None
        await self._channel.send(CloseSession(self.terms.session_id))
        if is_heard:
            await self._ended.wait()

    async def _reserve(self) -> None:
        terms, patience = self.terms, self._patience
        await self._channel.send(GetInfo())
        await self._channel.send(
            OpenSession(
                session_id=terms.session_id,
                epoch=terms.epoch,
                model=terms.model,
                blocks=(self.blocks.start, self.blocks.end),
                num_rows=terms.num_rows,
                max_length=terms.max_length or 0,
                dtype=str(terms.dtype).removeprefix("torch."),
                adapter=terms.adapter,
                alloc_timeout_seconds=patience.alloc_seconds,
            )
        )
        opened: SessionOpened | None = None
        info: Info | None = None
        while opened is None or info is None:
            seconds = patience.request_seconds + patience.alloc_seconds
            answer, _ = await self._channel.receive(seconds)
            match answer:
                case Info():
                    info = answer
                case SessionOpened(session_id=terms.session_id):
                    opened = answer
                case Refusal():
                    raise answer.to_error(self.peer_id)
                case _:
                    raise self._unexpected(answer)
        self.info = info
        self.lease_seconds = opened.lease_seconds
        self.max_length = opened.max_length

    async def _read(self) -> None:
        """The life of the channel after the opening."""
        try:
            while True:
                self._hear(*await self._channel.receive())
        except PetalsError as error:
            self.fail(error)

    def _hear(self, message: AnyMessage, tensors: list[Tensor]) -> None:
        match message:
            case StepResult():
                if message.session_id == self.terms.session_id and message.epoch >= self.epoch:
                    self._tell(message.step_id, Answer(message, tensors))
            case Refusal(step_id=int(step_id)):
                self._tell(step_id, message.to_error(self.peer_id))
            case Refusal():
                raise message.to_error(self.peer_id)
            case SessionEnded():
                self._ended.set()
                raise SessionClosed(
                    f"The server has ended the session: {message.reason or 'no reason given'}.",
                    hint="Open a new session.",
                    peer_id=self.peer_id,
                )
            case _:
                raise self._unexpected(message)

    def _tell(self, step_id: int, answer: Answer | PetalsError) -> None:
        if self.listener is not None:
            self.listener.on_answer(self, step_id, answer)

    def _unexpected(self, message: AnyMessage) -> ProtocolError:
        return ProtocolError(
            f"The server sent {type(message).__name__} out of turn.", peer_id=self.peer_id
        )


def is_finite(values: Tensor) -> bool:
    """True if there is no NaN and no infinity. One pass in the common case."""
    if not values.numel() or math.isfinite(values.sum().item()):
        return True
    return bool(torch.isfinite(values).all())


def check_states(hidden: Tensor) -> None:
    """Refuse states that no server would take. Raises BadInput."""
    if not hidden.dtype.is_floating_point:
        raise BadInput(
            f"Hidden states are floating point, not {hidden.dtype}.",
            hint="Token ids go through the model's embeddings first.",
        )
    if not is_finite(hidden):
        raise BadInput(
            "Hidden states hold NaN or infinity.",
            hint="Look at what made them: a prompt that is not trained well, a scale too large.",
        )


def check_width(hidden: Tensor, hidden_size: int) -> None:
    """Raises BadInput unless the last dimension of ``hidden`` is the model's."""
    if hidden.shape[-1] != hidden_size:
        raise BadInput(
            f"Hidden states have {hidden.shape[-1]} values, this model has {hidden_size}.",
            hint="Check that client and servers mean the same model.",
        )
