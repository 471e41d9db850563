"""One server's part of a session: open it, send requests, receive what comes back, close it.

One task reads the channel and passes messages on; a channel that ends, or a server that drops the
session, marks the hop as lost. Outputs are checked (number, shape, dtype, finite) before use.
Decides nothing: repairs and other routes are the supervisor's. Knows no model and no tokens.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from petals.client.session.actions import LegState
from petals.client.session.replies import Replies
from petals.client.session.types import HopNeighbours, HopTimeouts, SessionSpec
from petals.client.trace import HopTrace, StepTiming
from petals.clock import Clock
from petals.errors import (
    BadInput,
    PeerError,
    PeerFailed,
    PeerMisbehaved,
    PeerTimeout,
    PetalsError,
    ProtocolError,
    SessionClosed,
)
from petals.logs import get_logger
from petals.swarm.node import SwarmNode
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
from petals.wire.tensors import is_finite

logger = get_logger(__name__)

_KEPT_TIMINGS = 1024
"""Number of latest steps whose timings are kept."""


class HopSession:
    """A reservation at one server. ``open`` makes one; ``close`` frees it.

    state: how it is; only this class changes it. epoch, sources: those announced last.
    cache_tokens: what was asked for in each block.
    """

    def __init__(
        self, channel: Channel, hop: Hop, timeouts: HopTimeouts, replies: Replies, clock: Clock
    ) -> None:
        self.hop = hop
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self.state = LegState()
        self.epoch = 0
        self.sources: tuple[PeerId, ...] = ()
        self.lease_seconds = 0.0
        self.max_length = 0
        self.cache_tokens = 0
        self.info: Info
        self.timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self._channel = channel
        self._timeouts = timeouts
        self._replies = replies
        self._clock = clock
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
        spec: SessionSpec,
        timeouts: HopTimeouts,
        neighbours: HopNeighbours,
        replies: Replies,
    ) -> "HopSession":
        """Reserve cache at ``hop``, which will forward states between the client and its
        ``neighbours``. Raises the server's refusal or a PeerError, nothing held.
        """
        channel = await _open_channel(node, hop.peer_id, timeouts, timeouts.connect_seconds)
        session = cls(channel, hop, timeouts, replies, node.clock)
        try:
            async with asyncio.timeout(timeouts.request_seconds + timeouts.alloc_seconds):
                await session._reserve(spec, neighbours)
        except TimeoutError:
            await session.close()
            raise PeerTimeout("The server did not answer in time.", peer_id=hop.peer_id) from None
        except BaseException:
            await session.close()
            raise
        session._start_reading()
        return session

    async def redial(self, node: SwarmNode, seconds: float) -> None:
        """Open a new stream to a hop that is lost. Raises PeerError, the hop still lost.

        ``begin_epoch`` has to follow; if the server has no such reservation any more, the hop is
        lost again then.
        """
        seconds = min(self._timeouts.connect_seconds, seconds)
        channel = await _open_channel(node, self.peer_id, self._timeouts, seconds)
        await self._stop_reading()
        await self._channel.close()
        self._channel, self._ended, self.state = channel, asyncio.Event(), LegState()
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
        header = RequestHeader(self.session_id, epoch)
        await self._tell(BeginEpoch(header, tuple(sources)))
        # Only now: a call that was cancelled has announced nothing, and is repeated.
        self.epoch, self.sources = epoch, tuple(sources)

    async def keep(self) -> None:
        """A sign of life, so that the lease begins anew."""
        await self._tell(KeepSession(self.header()))

    def lose(self, error: PetalsError) -> None:
        """No answer will come from the hop any more, because of ``error``."""
        error.peer_id = error.peer_id or self.peer_id
        self._change(self.state.lost(error))

    def leave_as_slow(self, reason: str) -> None:
        """Give the hop up although it answers."""
        self._change(self.state.slow(PeerTimeout(reason, peer_id=self.peer_id)))

    def book(self) -> None:
        """The loss has been entered into bans and exclusions."""
        self.state = self.state.booked()

    async def close(self) -> None:
        """Free the reservation and wait, briefly, for the server to say so. Raises nothing.
        Idempotent.
        """
        try:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(self._timeouts.close_seconds):
                    await self._free()
        finally:
            self.lose(SessionClosed("The session was closed.", hint="Open a new one."))
            await self._stop_reading()
            await self._channel.close()

    def checked(self, tensors: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """The output, if it can be one for ``hidden``. Raises PeerMisbehaved."""
        if len(tensors) != 1:
            raise self.misbehaved(f"{len(tensors)} tensors instead of one")
        output = tensors[0]
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
            hint="It is avoided from now on; report it to the operators of the swarm.",
            peer_id=self.peer_id,
        )

    async def _tell(self, message: Message) -> None:
        """Send what is not answered; a server that does not take it is lost."""
        seconds = self._timeouts.request_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.send(message)
        except TimeoutError:
            self.lose(PeerTimeout(f"The server took no data for {seconds:g} s."))

    def _change(self, state: LegState) -> None:
        if state is not self.state:
            self.state = state
            if state.is_lost and state.error is not None:
                self._replies.lose(self.session_id, state.error)

    async def _free(self) -> None:
        if self._channel.is_closed:
            return
        is_read = self._reader is not None and not self._reader.done()
        await self._channel.send(CloseSession(self.header()))
        if is_read:
            await self._ended.wait()

    async def _reserve(self, spec: SessionSpec, neighbours: HopNeighbours) -> None:
        self.epoch, self.sources = spec.epoch, neighbours.sources
        self.cache_tokens = spec.cache_tokens
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
                alloc_timeout_seconds=self._timeouts.alloc_seconds,
                sources=self.sources,
                num_prompt_tokens=prompts[0].shape[1] if prompts else 0,
                next_peer=neighbours.after,
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
                    self.lease_seconds, self.max_length = opened.lease_seconds, opened.max_length
                case Draining():
                    self._take(answer, [])
                case Refusal():
                    raise answer.to_error(self.peer_id)
                case _:
                    raise self._unexpected(answer)
        self.info = info
        if info.hidden_size != spec.hidden_size:
            raise _other_width(info.hidden_size, spec.hidden_size, self.peer_id)

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
        match message:
            case StepResult() | ReplayDone() | ReplayPart() | ForwardFailed():
                self._replies.take(message.header, message, tensors)
            case Draining():
                self._change(self.state.draining(self._clock.monotonic() + message.seconds))
                self._replies.on_draining(self.peer_id, message.seconds)
            case Refusal(header=RequestHeader() as header):
                self._replies.take(header, message.to_error(self.peer_id))
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

    def _unexpected(self, message: AnyMessage) -> ProtocolError:
        return ProtocolError(
            f"The server sent {type(message).__name__} out of turn.", peer_id=self.peer_id
        )


async def _open_channel(
    node: SwarmNode, peer: PeerId, timeouts: HopTimeouts, seconds: float
) -> Channel:
    channel = await node.open_channel(peer, BLOCKS_SERVICE, seconds)
    channel.silence_seconds = timeouts.silence_seconds
    return channel


def _other_width(theirs: int, ours: int, peer: PeerId) -> BadInput:
    """A server that computes in another width. It says so itself, so it may as well be wrong."""
    error = BadInput(f"its hidden states have {theirs} values, not {ours}.", peer_id=peer)
    error.reported = True
    return error


def next_hops(hops: Sequence[HopSession]) -> NextHops:
    """Hops as messages name them."""
    return tuple(NextHop(hop.peer_id, hop.session_id) for hop in hops)
