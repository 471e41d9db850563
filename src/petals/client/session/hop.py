"""One server's part of a session: reserve it, send requests, match what comes back, free it.

A reply counts if its header (session id, epoch, request id) equals that of a request that waits at
this hop; there is no other rule by which replies are matched. One task reads the channel. A channel
that ends, or a server that drops the session, marks the hop as lost, which answers all its
requests. Decides nothing. Knows no model and no tokens.
"""

import asyncio
import contextlib
import math
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from petals.client.routing.latency import redial_seconds
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.types import SessionSpec
from petals.client.trace import HopTrace, StepTiming
from petals.errors import (
    BadInput,
    PeerError,
    PeerFailed,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    ProtocolError,
    SessionClosed,
)
from petals.logs import get_logger
from petals.swarm.rpc.channel import Channel
from petals.types import SESSION_ID_BYTES, BlockSpan, Hop, PeerId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.header import NextHop, NextHops, RequestHeader
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
    ReplayPart,
)
from petals.wire.services import BLOCKS_SERVICE

logger = get_logger(__name__)

_KEPT_TIMINGS = 1024
"""Number of latest steps whose timings are kept."""


class LegStatus(Enum):
    """How one hop of a session is."""

    CONNECTED = "it answers"
    DRAINING = "it answers, and has announced that it stops"
    BROKEN = "its stream is lost; it may still hold the rows"
    SLOW = "it answers, and is replaced by a faster server while it does"
    HUNG = "it answers pings, but not the step, and is left for another server"
    GONE = "it refuses, has misbehaved, or does not know the session any more"


@dataclass(frozen=True, slots=True)
class LegState:
    """The status of a hop; ``error`` is the reason of a loss, ``drains_at`` (s, monotonic) the time
    at which a draining server stops. is_booked: the loss has been entered into bans and exclusions.
    """

    status: LegStatus = LegStatus.CONNECTED
    error: PetalsError | None = None
    drains_at: float = 0.0
    is_booked: bool = False

    @property
    def is_lost(self) -> bool:
        """True if no answer will come any more."""
        return self.error is not None

    @property
    def may_hold_rows(self) -> bool:
        """True if the hop is lost, and calling it again may bring it and its rows back."""
        return self.status in (LegStatus.BROKEN, LegStatus.HUNG)

    @property
    def migrates(self) -> bool:
        """True if the hop serves until a replacement has its rows."""
        return self.status in (LegStatus.DRAINING, LegStatus.SLOW)

    def lost(self, error: PetalsError) -> "LegState":
        """The hop failed. The first reason counts, but what ends the reservation counts more."""
        if error is self.error:  # the loss has answered a request, and comes back as its reply
            return self
        is_stream = isinstance(error, PeerUnreachable | PeerTimeout) and not error.reported
        status = LegStatus.BROKEN if is_stream else LegStatus.GONE
        if self.status is status or self.status is LegStatus.GONE:
            return self
        return LegState(status, error)

    def hung(self, error: PetalsError) -> "LegState":
        """The hop lives, and is left because it does not answer a step."""
        return self if self.is_lost else LegState(LegStatus.HUNG, error)

    def slow(self) -> "LegState":
        """A faster server is to replace the hop; there is no hurry."""
        return LegState(LegStatus.SLOW, drains_at=math.inf) if self == LegState() else self

    def kept(self) -> "LegState":
        """No faster server could replace the hop."""
        return LegState() if self.status is LegStatus.SLOW else self

    def draining(self, until: float) -> "LegState":
        """The server has announced that it stops."""
        return self if self.is_lost else LegState(LegStatus.DRAINING, drains_at=until)

    def booked(self) -> "LegState":
        """The same, once the loss has been entered."""
        return replace(self, is_booked=True)


ReplyMessage = StepResult | ReplayDone | ReplayPart | ForwardFailed


@dataclass(frozen=True, slots=True, eq=False)
class HopReply:
    """What a hop has answered; its loss, and a refusal, are errors."""

    hop: "HopSession"
    message: ReplyMessage | PetalsError
    tensors: Sequence[Tensor] = ()


class HopSession:
    """A reservation at one server. ``open`` makes one; ``close`` frees it.

    state: how it is; only this class changes it. epoch, sources: those announced last. waiting:
    what takes the reply to a request, by the header of both. is_attached: the server is known to
    send replies to the present stream: it has sent one. relays_onward: the last states passed
    to the next hop through a relay. on_draining: called with the peer, once it has announced that
    it stops, and the seconds until then.
    """

    def __init__(
        self,
        swarm: SwarmState,
        hop: Hop,
        spec: SessionSpec,
        on_draining: Callable[[PeerId, float], None],
        channel: Channel,
    ) -> None:
        self.hop = hop
        self.spec = spec
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self.state = LegState()
        self.epoch = spec.epoch
        self.sources: tuple[PeerId, ...] = ()
        self.info: Info
        self.opened: SessionOpened
        self.timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self.waiting: dict[RequestHeader, Callable[[HopReply], None]] = {}
        self.is_attached = True
        self.relays_onward = False
        self._swarm = swarm
        self._on_draining = on_draining
        self._channel = channel
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
        return HopTrace(self.peer_id, self.blocks, tuple(self.timings), self._channel.is_relayed)

    @classmethod
    async def open(
        cls,
        swarm: SwarmState,
        hop: Hop,
        spec: SessionSpec,
        sources: Sequence[PeerId],
        next_peer: PeerId | None,
        on_draining: Callable[[PeerId, float], None],
    ) -> "HopSession":
        """Reserve cache at ``hop``, which will accept states from the client and from ``sources``
        and forward them to ``next_peer``. Raises the server's refusal or a PeerError, nothing held.
        """
        channel = await _dial(swarm, hop.peer_id, swarm.connect_seconds(hop.peer_id))
        session = cls(swarm, hop, spec, on_draining, channel)
        try:
            async with asyncio.timeout(swarm.config.request_timeout + spec.alloc_seconds):
                await session._reserve(sources, next_peer)
        except TimeoutError:
            await session.close()
            raise PeerTimeout("The server did not answer in time.", peer_id=hop.peer_id) from None
        except BaseException:
            await session.close()
            raise
        session._start_reading()
        return session

    async def redial(self) -> None:
        """Open a new stream to a hop that is lost. Raises PeerError, the hop still lost.

        ``begin_epoch`` has to follow; if the server has no such reservation any more, the hop is
        lost again then.
        """
        seconds = redial_seconds(self.trace.overhead_seconds, self._swarm.config.failover)
        seconds = min(self._swarm.connect_seconds(self.peer_id), seconds)
        await self._stop_reading()
        await self._channel.close()
        # Nothing may pause between the dial and the assignment: a call that is cancelled there
        # would leave a stream open.
        self._channel = await _dial(self._swarm, self.peer_id, seconds)
        self._ended, self.state, self.is_attached = asyncio.Event(), LegState(), False
        self._start_reading()

    def header(self, request_id: int = 0) -> RequestHeader:
        """The header of a request of the present epoch."""
        return RequestHeader(self.session_id, self.epoch, request_id)

    async def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Send a message; a server that cannot be reached is lost. The caller sets the deadline:
        a server may take no data for as long as it answers pings. Raises RequestTooLarge.
        """
        if self.state.is_lost:
            return
        try:
            await self._channel.send(message, tensors)
        except PeerError as error:
            self.lose(error)

    async def begin_epoch(self, epoch: int, sources: Sequence[PeerId]) -> None:
        """From now on states come from ``sources`` and the client, and older messages are dropped;
        replies come on this channel.
        """
        await self._tell(BeginEpoch(RequestHeader(self.session_id, epoch), tuple(sources)))
        # Only now: a call that was cancelled has announced nothing, and is repeated.
        self.epoch, self.sources = epoch, tuple(sources)

    async def keep(self) -> None:
        """A sign of life, so that the lease begins anew."""
        await self._tell(KeepSession(self.header()))

    def lose(self, error: PetalsError) -> None:
        """No answer will come from the hop any more, because of ``error``."""
        error.peer_id = error.peer_id or self.peer_id
        self._change(self.state.lost(error))

    def leave_as_hung(self, reason: str) -> None:
        """Give the hop up although it answers pings."""
        self._change(self.state.hung(PeerTimeout(reason, peer_id=self.peer_id)))

    def replace_as_slow(self) -> None:
        """Let a faster server replace the hop while it serves on."""
        self._change(self.state.slow())

    def keep_though_slow(self) -> None:
        """Serve on: there is no faster server that can replace the hop."""
        self._change(self.state.kept())

    def book(self) -> None:
        """The loss has been entered into bans and exclusions."""
        self.state = self.state.booked()

    async def close(self) -> None:
        """Free the reservation and wait, briefly, for the server to say so. Raises nothing.
        Idempotent.
        """
        try:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(self._swarm.config.failover.close_seconds):
                    await self._free()
        finally:
            self.lose(SessionClosed("The session was closed.", hint="Open a new one."))
            await self._stop_reading()
            await self._channel.close()

    async def _tell(self, message: Message) -> None:
        """Send what is not answered; a server that does not take it is lost."""
        seconds = self._swarm.config.request_timeout
        try:
            async with asyncio.timeout(seconds):
                await self.send(message)
        except TimeoutError:
            self.lose(PeerTimeout(f"The server took no data for {seconds:g} s."))

    def _change(self, state: LegState) -> None:
        if state is not self.state:
            self.state = state
            if state.error is not None:
                for take in list(self.waiting.values()):
                    take(HopReply(self, state.error))

    async def _free(self) -> None:
        if self._channel.is_closed:
            return
        is_read = self._reader is not None and not self._reader.done()
        await self._channel.send(CloseSession(self.header()))
        if is_read:
            await self._ended.wait()

    async def _reserve(self, sources: Sequence[PeerId], next_peer: PeerId | None) -> None:
        spec, self.sources = self.spec, tuple(sources)
        prompts = spec.tuning.prompts_of(self.blocks)
        await self._channel.send(GetInfo())
        await self._channel.send(
            OpenSession(
                header=self.header(),
                model=spec.model,
                blocks=(self.blocks.start, self.blocks.end),
                num_rows=spec.num_rows,
                max_length=spec.max_length or 0,
                dtype=str(spec.dtype).removeprefix("torch."),
                adapter=spec.adapter_name(self.blocks),
                alloc_timeout_seconds=spec.alloc_seconds,
                sources=self.sources,
                num_prompt_tokens=prompts[0].shape[1] if prompts else 0,
                next_peer=next_peer,
                fork_of=None if spec.fork is None else spec.fork.session_id,
                fork_lengths=() if spec.fork is None else spec.fork.lengths,
            ),
            prompts,
        )
        opened: SessionOpened | None = None
        info: Info | None = None
        while opened is None or info is None:
            answer, _ = await self._channel.receive()
            match answer:
                case Info():
                    info = answer
                case SessionOpened() if answer.header == self.header():
                    opened = answer
                case Draining():
                    self._take(answer, [])
                case Refusal():
                    raise answer.to_error(self.peer_id)
                case _:
                    raise self._unexpected(answer)
        self.info, self.opened = info, opened
        if info.hidden_size != spec.hidden_size:
            error = BadInput(
                f"its hidden states have {info.hidden_size} values, not {spec.hidden_size}.",
                peer_id=self.peer_id,
            )
            error.reported = True  # the server says so itself, so it may as well be wrong
            raise error

    def _start_reading(self) -> None:
        self._reader = asyncio.create_task(self._read(), name="replies of a hop")
        self._reader.add_done_callback(self._on_reader_done)

    async def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})

    async def _read(self) -> None:
        """The life of the channel after the opening."""
        try:
            while True:
                self._take(*await self._channel.receive())
        except PetalsError as error:
            self.lose(error)

    def _on_reader_done(self, reader: "asyncio.Task[None]") -> None:
        if not reader.cancelled() and reader.exception() is not None:
            logger.error("reading the replies of a hop failed", exc_info=reader.exception())
            self.lose(PeerFailed("The replies of the server could not be read."))

    def _take(self, message: AnyMessage, tensors: list[Tensor]) -> None:
        header = getattr(message, "header", None)
        if isinstance(header, RequestHeader) and header.session_id != self.session_id:
            return  # a hop knows the ids of the hops behind it, and must not answer for them
        self.is_attached = True
        match message:
            case StepResult() | ReplayDone() | ReplayPart() | ForwardFailed():
                self._answer(message.header, message, tensors)
            case Draining():
                clock = self._swarm.node.clock
                self._change(self.state.draining(clock.monotonic() + message.seconds))
                self._on_draining(self.peer_id, message.seconds)
            case Refusal(header=RequestHeader() as header):
                self._answer(header, message.to_error(self.peer_id))
            case Refusal():
                raise message.to_error(self.peer_id)
            case SessionEnded():
                self._ended.set()
                reason = message.reason or "no reason given"
                error = SessionClosed(f"The session was ended: {reason}.", peer_id=self.peer_id)
                error.reported = True
                raise error
            case _:
                raise self._unexpected(message)

    def _answer(
        self,
        header: RequestHeader,
        message: ReplyMessage | PetalsError,
        tensors: Sequence[Tensor] = (),
    ) -> None:
        """Pass a reply on to the request that it answers; drop it if there is none."""
        take = self.waiting.get(header)
        if take is not None:
            take(HopReply(self, message, tensors))

    def _unexpected(self, message: AnyMessage) -> ProtocolError:
        return ProtocolError(
            f"The server sent {type(message).__name__} out of turn.", peer_id=self.peer_id
        )


async def _dial(swarm: SwarmState, peer: PeerId, seconds: float) -> Channel:
    channel = await swarm.node.open_channel(peer, BLOCKS_SERVICE, seconds)
    channel.silence_seconds = swarm.config.silence_timeout
    return channel


def next_hops(hops: Sequence[HopSession]) -> NextHops:
    """Hops as messages name them."""
    return tuple(NextHop(hop.peer_id, hop.session_id) for hop in hops)
