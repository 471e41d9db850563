"""One server's leg of a session: open, send steps, hear what comes back, close.

A single task reads the channel and passes answers on by step id; a channel that ends, or a server
that drops the session, marks the leg as lost. What comes back is checked (session, epoch, shape,
dtype, finite) before anybody uses it. Decides nothing: repairs and other routes are its caller's.
Knows no model and no tokens.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from petals.client.connection.tensor_checks import is_finite
from petals.client.session.latency import redial_seconds
from petals.client.session.types import (
    HopNeighbours,
    HopTimeouts,
    Refill,
    ReplicaProgress,
    SessionSpec,
    StepCall,
    StepReply,
)
from petals.client.trace import HopTrace, StepTiming
from petals.errors import (
    PeerError,
    PeerMisbehaved,
    PetalsError,
    ProtocolError,
    RequestError,
    SessionClosed,
    SessionError,
)
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import BlockSpan, Hop, PeerId, Route
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.header import NextHop
from petals.wire.messages import AnyMessage
from petals.wire.replies import (
    Draining,
    ForwardFailed,
    Info,
    ReplayDone,
    SessionEnded,
    SessionOpened,
    StepResult,
)
from petals.wire.requests import (
    BeginEpoch,
    CloseSession,
    GetInfo,
    KeepSession,
    OpenSession,
    ReplayRequest,
    Step,
)
from petals.wire.services import BLOCKS_SERVICE

_CLOSE_SECONDS = 2.0
_KEPT_TIMINGS = 1024


class Listener(Protocol):
    """Who wants to know what a hop says."""

    def on_answer(self, hop: "HopSession", step_id: int, answer: StepReply | PetalsError) -> None:
        """A result or a refusal."""
        ...

    def on_replayed(self, hop: "HopSession", delivered: bool) -> None:
        """Rows are refilled as far as ``hop``; not ``delivered``: it cannot reach the next one."""
        ...

    def on_undelivered(self, hop: "HopSession", step_id: int, replay: bool) -> None:
        """What ``hop`` has put out may not have reached the next one, nor ever will."""
        ...

    def on_outputs(self, hop: "HopSession", step: Step, tensors: Sequence[Tensor]) -> None:
        """A part of a replay that we asked for ourselves."""
        ...

    def on_lost(self, hop: "HopSession") -> None:
        """``hop.failure`` says why nothing more will come."""
        ...

    def on_leaving(self, hop: "HopSession") -> None:
        """The server goes in ``hop.leaving_seconds``; until then it serves."""
        ...


class HopSession:
    """A reservation at one server. ``open`` makes one; ``close`` frees what it holds there."""

    def __init__(
        self, channel: Channel, hop: Hop, terms: SessionSpec, patience: HopTimeouts
    ) -> None:
        self.hop = hop
        self.terms = terms
        self.epoch = terms.epoch
        self.lease_seconds = 0.0
        self.max_length = terms.max_length or 0
        self.timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self.failure: PetalsError | None = None
        """Why this leg is lost; None while it stands."""
        self.is_straggler = False
        """Whether it is lost because we left it for a faster one."""
        self.leaving_seconds: float | None = None
        """How long the server stays, if it has said that it leaves."""
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
        timings, is_relayed = tuple(self.timings), self._channel.is_relayed
        return HopTrace(self.peer_id, self.blocks, timings, is_relayed)

    @classmethod
    async def open(
        cls,
        node: SwarmNode,
        hop: Hop,
        terms: SessionSpec,
        patience: HopTimeouts,
        neighbours: HopNeighbours,
    ) -> "HopSession":
        """Reserve room at ``hop``, which will hand on states between us and its ``neighbours``.

        Raises the server's refusal or a PeerError, nothing held.
        """
        channel = await _open_channel(node, hop.peer_id, patience, patience.connect_seconds)
        session = cls(channel, hop, terms, patience)
        try:
            await session._reserve(neighbours)
        except (RequestError, SessionError):
            await channel.close()
            raise
        except BaseException:
            await session.close()
            raise
        session._start_reading()
        return session

    async def reconnect(self, node: SwarmNode) -> None:
        """Take up a session whose stream broke, on a new one. Raises PeerError, the leg still lost.

        If the server has no such session any more, the leg is lost again in a moment.
        """
        seconds = redial_seconds(self.trace.overhead_seconds)
        seconds = min(self._patience.connect_seconds, seconds)
        channel = await _open_channel(node, self.peer_id, self._patience, seconds)
        await self._channel.close()
        self._channel, self._ended, self.failure = channel, asyncio.Event(), None
        self._start_reading()
        await self.keep()

    def _start_reading(self) -> None:
        self._reader = asyncio.create_task(self._read(), name="answers of a hop")

    async def send(self, call: StepCall, hidden: Tensor, next_hops: Route = ()) -> None:
        """Ask for a step; the listener hears the answer. hidden: [sum(counts), H].

        The output goes to ``next_hops``, and back from the last of them. Raises RequestTooLarge; a
        server that cannot be reached is a lost hop.
        """
        message = Step(
            session_id=self.terms.session_id,
            epoch=self.epoch,
            step_id=call.step_id,
            starts=call.starts,
            counts=call.counts,
            reorder=call.reorder,
            next_hops=on_the_wire(next_hops),
            replay=call.refill is not Refill.NO,
            ends=call.refill is Refill.LAST,
            reordered=call.reordered,
        )
        await self._say(message, (hidden,))

    async def begin_epoch(self, epoch: int, sources: Sequence[PeerId]) -> None:
        """From now on states come from ``sources`` and us; frames of older epochs are dropped."""
        self.epoch = epoch
        await self._say(BeginEpoch(self.terms.session_id, epoch, tuple(sources)))

    async def replay(
        self,
        step_id: int,
        lengths: Sequence[int],
        next_hops: Route,
        *,
        reorder: tuple[int, ...] | None = None,
        held: ReplicaProgress | None = None,
        pages: bool = False,
    ) -> None:
        """Have ``next_hops`` refilled from what this hop has put out before step ``step_id``; if
        there are none, it comes to us. With ``pages`` the one next hop gets what its blocks keep.

        lengths: tokens of each row, as the rows are before the ``reorder`` of that step. ``held``
        is what the next hops have already; None: all their rows begin anew.
        """
        await self._say(
            ReplayRequest(
                session_id=self.terms.session_id,
                epoch=self.epoch,
                step_id=step_id,
                lengths=tuple(lengths),
                next_hops=on_the_wire(next_hops),
                reorder=reorder,
                starts=() if held is None else held.lengths,
                onto=None if held is None else held.rows,
                pages=pages,
            )
        )

    async def _say(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        if self.failure is not None:
            return
        try:
            await self._channel.send(message, tensors)
        except PeerError as error:
            self.fail(error)

    async def keep(self) -> None:
        """A sign of life, so that the lease begins anew."""
        await self._say(KeepSession(self.terms.session_id, (self.blocks.start, self.blocks.end)))

    def is_mute_since(self, when: float) -> bool:
        """True if the leg stands, and not even a ping was answered since ``when`` (monotonic)."""
        return self.failure is None and self._channel.heard_at < when

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

    def checked(self, answer: StepReply, hidden: Tensor) -> Tensor:
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
        # A server that has ended the session may have begun it anew for our successor.
        if self._channel.is_closed or isinstance(self.failure, SessionClosed):
            return
        is_heard = self._reader is not None and self.failure is None
        await self._channel.send(CloseSession(self.terms.session_id))
        if is_heard:
            await self._ended.wait()

    async def _reserve(self, neighbours: HopNeighbours) -> None:
        terms, patience = self.terms, self._patience
        prompts = terms.tuning.prompts_of(self.blocks)
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
                adapter=terms.adapter_name(self.blocks),
                alloc_timeout_seconds=patience.alloc_seconds,
                sources=neighbours.sources,
                num_prompt_tokens=prompts[0].shape[1] if prompts else 0,
                onward=neighbours.after,
            ),
            prompts,
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
                case Draining():
                    self._on_leaving(answer)
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
                    self._tell(message.step_id, StepReply(message, tensors))
            case ReplayDone():
                if message.session_id == self.terms.session_id and message.epoch == self.epoch:
                    self._tell_replayed(not message.undelivered)
            case ForwardFailed():
                if message.session_id == self.terms.session_id and message.epoch == self.epoch:
                    self._tell_undelivered(message)
            case Step(replay=True):
                if message.session_id == self.terms.session_id and message.epoch == self.epoch:
                    self._tell_outputs(message, tensors)
            case Draining():
                self._on_leaving(message)
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

    def _tell(self, step_id: int, answer: StepReply | PetalsError) -> None:
        if self.listener is not None:
            self.listener.on_answer(self, step_id, answer)

    def _on_leaving(self, message: Draining) -> None:
        if message.session_id == self.terms.session_id:
            self.leaving_seconds = message.seconds
            if self.listener is not None:
                self.listener.on_leaving(self)

    def _tell_outputs(self, step: Step, tensors: Sequence[Tensor]) -> None:
        if self.listener is not None:
            self.listener.on_outputs(self, step, tensors)

    def _tell_undelivered(self, message: ForwardFailed) -> None:
        if self.listener is not None:
            self.listener.on_undelivered(self, message.step_id, message.replay)

    def _tell_replayed(self, delivered: bool) -> None:
        if self.listener is not None:
            self.listener.on_replayed(self, delivered)

    def _unexpected(self, message: AnyMessage) -> ProtocolError:
        return ProtocolError(
            f"The server sent {type(message).__name__} out of turn.", peer_id=self.peer_id
        )


async def _open_channel(
    node: SwarmNode, peer: PeerId, patience: HopTimeouts, seconds: float
) -> Channel:
    channel = await node.open_channel(peer, BLOCKS_SERVICE, seconds)
    channel.silence_seconds = patience.silence_seconds
    return channel


def on_the_wire(route: Route) -> tuple[NextHop, ...]:
    """Hops as messages name them."""
    return tuple(NextHop(hop.peer_id, (hop.blocks.start, hop.blocks.end)) for hop in route)
