"""The hops of one session and how a step gets through them.

States travel along *arcs*: consecutive hops that hand them on to each other; between two arcs they
pass through the client. An answer to a step counts from whichever hop it comes. Knows servers and
reservations; repairs nothing, and knows no rows and no tokens.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from petals.client.hop import Answer, HopSession, StepCall
from petals.client.opening import release
from petals.client.swarm_view import SwarmView
from petals.client.trace import StepTiming
from petals.errors import (
    BadInput,
    PeerError,
    PeerTimeout,
    PetalsError,
    SessionClosed,
)
from petals.types import Route

_SIGNS_PER_LEASE = 3
_MIN_SIGN_SECONDS = 0.05


@dataclass(slots=True, eq=False)
class Piece:
    """A step under way. hidden: [tokens, H]; output: the same shape, once it has come."""

    call: StepCall
    hidden: Tensor
    output: Tensor | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    """A step whose answer may come from hop ``first`` or any hop after it."""

    first: int
    heard: "asyncio.Future[tuple[int, Answer | PetalsError] | None]"


class SessionPath:
    """Reservations that lead through all blocks of a session; it owns them."""

    def __init__(self, hops: Sequence[HopSession], swarm: SwarmView) -> None:
        self.hops = list(hops)
        self._swarm = swarm
        self._waiting: dict[int, _Waiting] = {}
        for hop in self.hops:
            hop.listener = self
        self._keeper = asyncio.create_task(self._keep_alive(), name="signs of life")
        self._closed = False
        swarm.paths.add(self)

    @property
    def route(self) -> Route:
        return tuple(hop.hop for hop in self.hops)

    @property
    def lost(self) -> list[HopSession]:
        """Hops that nothing more will come from."""
        return [hop for hop in self.hops if hop.failure is not None]

    @property
    def max_length(self) -> int:
        """Tokens per row that every hop has granted."""
        return min(hop.max_length for hop in self.hops)

    @property
    def max_step_tokens(self) -> int:
        """Tokens the smallest hop takes in one step; 0 if none of them has a limit."""
        limits = [hop.info.max_batch_tokens for hop in self.hops]
        return min((limit for limit in limits if limit), default=0)

    @property
    def hidden_size(self) -> int:
        """Width of the states, as the first server says."""
        return self.hops[0].info.hidden_size

    async def run(self, pieces: Sequence[Piece]) -> None:
        """Get the output of every piece, the hops working on them one behind the other.

        Raises a RequestError that a server answered with, and whatever else stopped it: ``lost``
        tells whether a hop is to blame.
        """
        if len(pieces) == 1:
            await self._step(pieces[0])
            return
        under_way = asyncio.Semaphore(len(self.hops) + 1)

        async def run(piece: Piece) -> None:
            async with under_way:
                await self._step(piece)

        tasks = [asyncio.create_task(run(piece)) for piece in pieces]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def close(self) -> None:
        """Free all reservations. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._keeper.cancel()
        self._swarm.paths.discard(self)
        await release(self.hops)

    # What the hops say

    def on_answer(self, hop: HopSession, step_id: int, answer: Answer | PetalsError) -> None:
        """See ``Listener``. Answers to what nobody waits for any more are dropped."""
        waiting = self._waiting.get(step_id)
        if waiting is None or waiting.heard.done():
            return
        index = self.hops.index(hop)
        if index >= waiting.first:
            waiting.heard.set_result((index, answer))

    def on_lost(self, hop: HopSession) -> None:
        """See ``Listener``."""
        assert hop.failure is not None
        index = self.hops.index(hop)
        for waiting in self._waiting.values():
            if index >= waiting.first and not waiting.heard.done():
                waiting.heard.set_result((index, hop.failure))

    # One step

    async def _step(self, piece: Piece) -> None:
        hidden, at = piece.hidden, 0
        with self._expect(piece.call.step_id) as waiting:
            while at < len(self.hops):
                waiting.first = at
                index, answer, seconds = await self._ask(waiting, piece.call, hidden)
                hop = self.hops[index]
                if isinstance(answer, PetalsError):
                    raise self._judged(index, at, answer)
                try:
                    output = hop.checked(answer, hidden)
                except PeerError as error:
                    hop.fail(error)
                    raise
                self._note_timing(hop, piece.call, answer, seconds)
                hidden, at = output, index + 1
        piece.output = hidden

    async def _ask(
        self, waiting: _Waiting, call: StepCall, hidden: Tensor
    ) -> tuple[int, Answer | PetalsError, float]:
        """Send a step to hop ``waiting.first``; who answered what, after how many seconds."""
        began = self._now()
        hop = self.hops[waiting.first]
        waiting.heard = asyncio.get_running_loop().create_future()
        if hop.failure is not None:
            raise hop.failure
        await hop.send(call, hidden)
        heard = await self._hear(waiting, self._swarm.config.request_timeout)
        if heard is None:
            error = PeerTimeout(
                f"No answer to a step within {self._swarm.config.request_timeout:g} s."
            )
            hop.fail(error)
            raise error
        return *heard, self._now() - began

    async def _hear(
        self, waiting: _Waiting, seconds: float
    ) -> tuple[int, Answer | PetalsError] | None:
        timer = self._swarm.node.clock.call_later(seconds, partial(_expire, waiting.heard))
        try:
            return await waiting.heard
        finally:
            timer.cancel()

    def _judged(self, index: int, first: int, error: PetalsError) -> PetalsError:
        """A refusal or a loss, laid at the right door."""
        if isinstance(error, BadInput) and index > first:
            # We checked what went in, so it was spoilt by the hop that handed it on.
            index -= 1
            error = self.hops[index].misbehaved(f"states that its neighbour refused: {error}")
        if isinstance(error, PeerError | SessionClosed):
            self.hops[index].fail(error)
        return error

    def _note_timing(self, hop: HopSession, call: StepCall, answer: Answer, seconds: float) -> None:
        result = answer.result
        hop.timings.append(
            StepTiming(
                call.step_id,
                call.num_tokens,
                seconds,
                result.queue_seconds,
                result.compute_seconds,
                result.batch_tokens,
            )
        )

    @contextmanager
    def _expect(self, step_id: int) -> Iterator[_Waiting]:
        waiting = _Waiting(0, asyncio.get_running_loop().create_future())
        self._waiting[step_id] = waiting
        try:
            yield waiting
        finally:
            del self._waiting[step_id]

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()

    async def _keep_alive(self) -> None:
        while True:
            lease = min(hop.lease_seconds for hop in self.hops)
            await asyncio.sleep(max(lease / _SIGNS_PER_LEASE, _MIN_SIGN_SECONDS))
            await asyncio.gather(*(hop.keep() for hop in self.hops))


def _expire(heard: "asyncio.Future[tuple[int, Answer | PetalsError] | None]") -> None:
    if not heard.done():
        heard.set_result(None)


def joined(pieces: Sequence[Piece]) -> Tensor:
    """The outputs of pieces that are all done, packed."""
    return torch.cat([piece.output for piece in pieces if piece.output is not None])
