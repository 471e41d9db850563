"""One server's leg of a session: open, step, keep alive, close.

What comes back is checked (session, step, shape, dtype, finite) before anybody uses it. Raises
typed errors and decides nothing: retries and other routes are its caller's. Knows no model and no
tokens.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from petals.client.trace import HopTrace, StepTiming
from petals.errors import (
    BadInput,
    PeerError,
    PeerMisbehaved,
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
    """How long to wait for a stream, for one answer, for room in the server's cache."""

    connect_seconds: float
    request_seconds: float
    alloc_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCall:
    """One step as every hop gets it: row r runs ``counts[r]`` tokens from ``starts[r]``."""

    step_id: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class HopSession:
    """A reservation at one server. ``open`` makes one; ``close`` frees what it holds there."""

    def __init__(self, channel: Channel, hop: Hop, terms: Terms, patience: Patience) -> None:
        self.hop = hop
        self.terms = terms
        self.lease_seconds = 0.0
        self.max_length = terms.max_length or 0
        self.timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self._channel = channel
        self._patience = patience
        self._reorder: tuple[int, ...] | None = None
        self.lost_reorder = False
        """True if nobody knows whether the server has reordered its rows."""
        self._receiving = asyncio.Lock()

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

    @property
    def is_broken(self) -> bool:
        """True once the stream to the server has ended."""
        return self._channel.is_closed

    @classmethod
    async def open(
        cls, node: SwarmNode, hop: Hop, terms: Terms, patience: Patience
    ) -> "HopSession":
        """Reserve room at ``hop``. Raises the server's refusal or a PeerError, nothing held."""
        channel = await node.open_channel(hop.peer_id, BLOCKS_SERVICE, patience.connect_seconds)
        session = cls(channel, hop, terms, patience)
        try:
            await session._reserve()
        except (RequestError, SessionError):
            await channel.close()
            raise
        except BaseException:
            await session.close()
            raise
        return session

    def note_reorder(self, rows: Sequence[int]) -> None:
        """New row r continues old row ``rows[r]``; it rides on the next step."""
        before = self._reorder
        self._reorder = tuple(rows) if before is None else tuple(before[row] for row in rows)

    async def step(self, call: StepCall, hidden: Tensor) -> Tensor:
        """Run the step's tokens through this hop's blocks: ``[sum(counts), H]`` in and out.

        Steps may be sent ahead of answers, in order. Raises the server's refusal (the session's
        position is then unchanged), PeerError when the server or the link fails, SessionClosed if
        the server has ended the session.
        """
        began = perf_counter()
        terms, reorder = self.terms, self._reorder
        message = Step(
            terms.session_id, terms.epoch, call.step_id, call.starts, call.counts, reorder
        )
        self._reorder = None
        try:
            await self._channel.send(message, (hidden,))
            async with self._receiving:  # steps sent ahead are answered in their order
                result, tensors = await self._answer(call.step_id)
        except RequestError:
            self._reorder = reorder  # refused before anything was done
            raise
        except BaseException:
            self.lost_reorder = self.lost_reorder or reorder is not None
            raise
        output = self._checked(tensors, hidden)
        self.timings.append(
            StepTiming(
                call.step_id,
                len(hidden),
                perf_counter() - began,
                result.queue_seconds,
                result.compute_seconds,
                result.batch_tokens,
            )
        )
        return output

    async def keep(self) -> None:
        """A sign of life, so that the lease begins anew. Raises PeerError if the server is gone."""
        await self._channel.send(KeepSession(self.terms.session_id))

    async def close(self) -> None:
        """Free the reservation and wait, briefly, for the server to say so. Raises nothing."""
        try:
            with contextlib.suppress(PeerError):
                if not self._channel.is_closed:
                    await self._channel.send(CloseSession(self.terms.session_id))
                    if not self._receiving.locked():
                        await self._until_ended()
        finally:
            await self._channel.close()

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
            answer = await self._receive(patience.request_seconds + patience.alloc_seconds)
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

    async def _receive(self, timeout: float) -> AnyMessage:
        message, tensors = await self._channel.receive(timeout)
        if tensors:
            raise self._unexpected(message)
        return message

    async def _answer(self, step_id: int) -> tuple[StepResult, list[Tensor]]:
        """The answer to a step; what interrupted steps or older epochs left is dropped."""
        terms = self.terms
        while True:
            message, tensors = await self._channel.receive(self._patience.request_seconds)
            match message:
                case StepResult():
                    if message.step_id < step_id or message.epoch < terms.epoch:
                        continue
                    if message.step_id == step_id and message.session_id == terms.session_id:
                        return message, tensors
                    raise self._unexpected(message)
                case Refusal():
                    if message.step_id is not None and message.step_id < step_id:
                        continue
                    raise message.to_error(self.peer_id)
                case SessionEnded():
                    raise SessionClosed(
                        f"The server has ended the session: {message.reason or 'no reason given'}.",
                        hint="Open a new session.",
                        peer_id=self.peer_id,
                    )
                case _:
                    raise self._unexpected(message)

    def _checked(self, tensors: list[Tensor], hidden: Tensor) -> Tensor:
        """The output, if it can be one for ``hidden``."""
        if len(tensors) != 1:
            raise self._misbehaved(f"{len(tensors)} tensors instead of one")
        output = tensors[0]
        if output.shape != hidden.shape or output.dtype != hidden.dtype:
            raise self._misbehaved(
                f"{output.dtype} {list(output.shape)} for {hidden.dtype} {list(hidden.shape)}"
            )
        if not is_finite(output):
            raise self._misbehaved("NaN or infinity")
        return output

    async def _until_ended(self) -> None:
        while True:
            message, _ = await self._channel.receive(_CLOSE_SECONDS)
            if isinstance(message, SessionEnded | Refusal):
                return

    def _unexpected(self, message: AnyMessage) -> ProtocolError:
        return ProtocolError(
            f"The server sent {type(message).__name__} out of turn.", peer_id=self.peer_id
        )

    def _misbehaved(self, what: str) -> PeerMisbehaved:
        return PeerMisbehaved(
            f"The server of blocks {self.blocks} answered with {what}.",
            hint="It is avoided from now on; report it to whoever runs the swarm.",
            peer_id=self.peer_id,
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
