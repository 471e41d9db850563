"""How messages get through the hops of a session, and who answers them.

States travel along direct segments: consecutive hops that forward to each other; between two
segments they pass through the client. A piece of a step is answered by whichever hop has the
output. What stops a piece is written into the state of the hop that is to blame. Repairs nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf

from torch import Tensor

from petals.client.config import ClientConfig
from petals.client.routing.failure_policy import misbehaved
from petals.client.routing.latency import StepTimeouts
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopReply, HopSession, next_hops
from petals.client.session.state import SessionState, StepPiece
from petals.client.session.types import SessionSpec
from petals.client.trace import EdgeTrace, StepTiming, Way
from petals.errors import PeerMisbehaved, PeerTimeout, PetalsError, RequestError
from petals.logs import get_logger
from petals.models.runtime.rope_lengths import to_runs
from petals.swarm.background import gather_bounded
from petals.types import PeerId
from petals.wire.replies import ForwardFailed, StepResult
from petals.wire.requests import ReplayPart, Step
from petals.wire.tensors import what_is_wrong

logger = get_logger(__name__)

TakePart = Callable[[ReplayPart, Sequence[Tensor]], bool]
"""Takes a part of a replay to the client; True if no more parts are to come."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionContext:
    """One session's state, the swarm it runs in, and how long it waits for replies.

    on_draining: called with a peer that stops, and the seconds until then.
    """

    state: SessionState
    swarm: SwarmState
    spec: SessionSpec
    timeouts: StepTimeouts
    on_draining: Callable[[PeerId, float], None]

    @property
    def config(self) -> ClientConfig:
        return self.swarm.config

    @property
    def now(self) -> float:
        """Time (s, monotonic)."""
        return self.swarm.node.clock.monotonic()

    def is_direct(self, near: PeerId, far: PeerId) -> bool:
        """Whether ``near`` may forward to ``far`` now. False for one server in two hops in a row:
        servers do not forward to themselves.
        """
        is_open = self.now >= self.swarm.closed_links.get((near, far), 0.0)
        return is_open and near != far and self.config.use_server_to_server

    def segment_end(self, hops: Sequence[HopSession], start: int = 0) -> int:
        """The first hop after ``start`` that its predecessor does not forward to.

        A hop whose stream was opened anew gets its next states from the client, on that stream.
        States from another hop could arrive before the new stream is known there, and the reply
        would go to the old one.
        """
        end = start + 1
        while end < len(hops) and hops[end].is_attached:
            if not self.is_direct(hops[end - 1].peer_id, hops[end].peer_id):
                break
            end += 1
        return end

    def close_links(self, hops: Sequence[HopSession]) -> None:
        """For ``link_retry_seconds``, states between each two of these hops, in this direction, go
        through the client.
        """
        for near, far in pairwise(hops):
            logger.debug("…%s to …%s goes through the client", near.peer_id[-6:], far.peer_id[-6:])
            until = self.now + self.config.failover.link_retry_seconds
            self.swarm.closed_links[near.peer_id, far.peer_id] = until

    def edges(self) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        edges = []
        for near, far in pairwise(self.state.legs):
            way = Way.RELAYED if near.relays_onward else Way.DIRECT
            if not self.is_direct(near.peer_id, far.peer_id):
                way = Way.VIA_CLIENT
            edges.append(EdgeTrace(near.peer_id, far.peer_id, way))
        return tuple(edges)


class PendingReply:
    """A request whose answer may come from any of ``hops``.

    take_part: for the parts of a replay to the client; the last one is the answer.
    """

    def __init__(self, hops: Sequence[HopSession], take_part: TakePart | None) -> None:
        self.hops = hops
        self._take_part = take_part
        self._reported: set[HopSession] = set()
        self._reply: asyncio.Future[HopReply] = asyncio.get_running_loop().create_future()
        self._began = 0.0
        self._limit: asyncio.Timeout | None = None

    async def receive(self, seconds: float, send: Callable[[], Awaitable[None]]) -> HopReply | None:
        """``send`` the request and return the reply; None after ``seconds`` for both."""
        loop = asyncio.get_running_loop()
        self._reply, self._began = loop.create_future(), loop.time()
        try:
            async with asyncio.timeout(seconds) as self._limit:
                await send()
                return await self._reply
        except TimeoutError:
            return None
        finally:
            self._limit = None

    def limit(self, seconds: float) -> None:
        """Wait no longer than ``seconds`` in all."""
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._began + seconds)

    def take(self, reply: HopReply) -> None:
        """A reply to this request."""
        if self._reply.done() or reply.hop not in self.hops:
            return
        if isinstance(reply.message, ForwardFailed):
            # Counts once for every hop: one that reports losses for ever would hold up the step.
            if reply.hop in self._reported or reply.hop is self.hops[-1]:
                return
            self._reported.add(reply.hop)
        if isinstance(reply.message, ReplayPart) and self._take_part is not None:
            is_last = self._take_part(reply.message, reply.tensors)
            if not is_last:
                return
        self._reply.set_result(reply)


@contextmanager
def expect(
    hops: Sequence[HopSession], request_id: int, take_part: TakePart | None = None
) -> Iterator[PendingReply]:
    """Wait for answers to a request that passes all ``hops`` in their present epochs."""
    pending = PendingReply(hops, take_part)
    headers = [(hop, hop.header(request_id)) for hop in hops]
    for hop, header in headers:
        hop.waiting[header] = pending.take
    try:
        yield pending
    finally:
        for hop, header in headers:
            del hop.waiting[header]


async def run_pieces(context: SessionContext, pieces: Sequence[StepPiece]) -> bool:
    """Get the outputs of all pieces, the hops working on them one behind the other.

    False: some have none, and a hop is lost. Raises RequestTooLarge.
    """
    return await _PiecesRun(context, pieces).run()


class _PiecesRun:
    """The way of some pieces through all hops.

    Pieces are sent to each hop in their order, also when the client takes over from a direct link
    that has failed with several pieces under way.
    """

    def __init__(self, context: SessionContext, pieces: Sequence[StepPiece]) -> None:
        self._context = context
        self._legs = context.state.legs
        self._pieces = pieces
        self._began = context.now
        self._num_done = 0
        self._paced: set[PendingReply] = set()
        """Requests along several hops. Pieces that are done show how long these may take."""
        self._reached = [-1.0] * len(pieces)
        """The last hop that each piece has been sent to."""
        self._moved = asyncio.Event()

    async def run(self) -> bool:
        """True if all pieces have their outputs."""
        timeouts = self._context.timeouts
        timeouts.begin(sum(piece.num_tokens for piece in self._pieces))
        if len(self._pieces) == 1:
            await self._run(0)
        else:
            works = [partial(self._run, number) for number in range(len(self._pieces))]
            await gather_bounded(works, len(self._legs) + 1)
        is_done = all(piece.output is not None for piece in self._pieces)
        if is_done:
            timeouts.end(self._context.now - self._began)
        return is_done

    async def _run(self, number: int) -> None:
        piece, timeouts = self._pieces[number], self._context.timeouts
        piece.output = None
        try:
            await self._pass_through(number, piece)
        finally:
            self._reach(number, inf)  # it is sent to no hop any more
        if piece.output is not None:
            self._num_done += piece.num_tokens
            timeouts.note_progress(self._num_done, self._context.now - self._began)
            for pending in self._paced:
                pending.limit(timeouts.seconds())

    def _note_timeout(self) -> None:
        """What is measured begins anew: time that was waited in vain must not make the next waits
        longer.
        """
        self._context.timeouts.note_timeout()
        self._began, self._num_done = self._context.now, 0

    async def _turn(self, number: int, hop: int) -> None:
        """Return once the piece before has been sent to ``hop``; the next thing is to send this."""
        while number and self._reached[number - 1] < hop:
            self._moved = asyncio.Event() if self._moved.is_set() else self._moved
            await self._moved.wait()
        self._reach(number, hop)

    def _reach(self, number: int, hop: float) -> None:
        self._reached[number] = max(self._reached[number], hop)
        self._moved.set()

    async def _pass_through(self, number: int, piece: StepPiece) -> None:
        context, legs, hidden, at = self._context, self._legs, piece.rows.hidden, 0
        with expect(legs, piece.request_id) as pending:
            while at < len(legs):
                await self._turn(number, at)
                if any(leg.state.is_lost for leg in legs[at:]):
                    return
                began, end = context.now, context.segment_end(legs, at)
                pending.hops = legs[at:]
                reply = await self._ask(pending, piece, hidden, legs[at:end])
                if reply is None:
                    # All of a segment live: between two of them something does not pass. A single
                    # hop is lost now.
                    self._note_timeout()
                    context.close_links(legs[at:end])
                    continue
                index, output = legs.index(reply.hop), _output(reply, hidden)
                if isinstance(output, Tensor) and isinstance(reply.message, StepResult):
                    _note(reply.message, legs[at : index + 1], piece, context.now - began)
                    if reply.message.undelivered:
                        context.close_links(legs[index : index + 2])
                    hidden, at = output, index + 1
                elif output is None:
                    context.close_links(legs[index : index + 2])
                elif index > at and isinstance(output, RequestError | PeerMisbehaved):
                    # The input came from the hop before, and the client has not seen it. Next time
                    # it does, and knows which of the two is wrong.
                    context.close_links(legs[index - 1 : index + 1])
                else:
                    reply.hop.lose(output)
        piece.output = hidden

    async def _ask(
        self, pending: PendingReply, piece: StepPiece, hidden: Tensor, segment: Sequence[HopSession]
    ) -> HopReply | None:
        """Send a piece along a segment. None if no hop answers; a single one is then lost."""
        context, hop, rows = self._context, segment[0], piece.rows
        message = Step(
            header=hop.header(piece.request_id),
            starts=rows.starts,
            counts=rows.counts,
            reorder=piece.reorder,
            rope_runs=to_runs(rows.starts, rows.counts, rows.rope_lengths),
            next_hops=next_hops(segment[1:]),
        )
        send = partial(hop.send, message, (hidden,))
        if len(segment) > 1:
            self._paced.add(pending)
            try:
                return await pending.receive(context.timeouts.seconds(), send)
            finally:
                self._paced.discard(pending)
        seconds, hung_seconds = context.config.request_timeout, context.timeouts.hung_seconds()

        def leave_if_hung() -> None:
            # It answers pings but not the step. Where no other server that was measured and has
            # room can take its place, waiting is all that can be done.
            if context.swarm.alternative_seconds(hop.hop, hop.spec.cache_tokens) is not None:
                hop.leave_as_hung(f"It lives, but has not answered a step in {hung_seconds:.0f} s.")

        look = context.swarm.node.clock.call_later(hung_seconds, leave_if_hung)
        try:
            reply = await pending.receive(seconds, send)
        finally:
            look.cancel()
        if reply is None:
            hop.lose(PeerTimeout(f"No answer to a step within {seconds:g} s."))
        return reply


def _output(reply: HopReply, hidden: Tensor) -> Tensor | PetalsError | None:
    """The output that a reply brings, or what is wrong with it; None: the next hop lacks it."""
    match reply.message:
        case StepResult():
            wrong = what_is_wrong(reply.tensors, [hidden])
            return misbehaved(reply.hop.hop, wrong) if wrong else reply.tensors[0]
        case ForwardFailed():
            return None
        case PetalsError() as error:
            return error
    return misbehaved(reply.hop.hop, "something else than an output")


def _note(
    result: StepResult, passed: Sequence[HopSession], piece: StepPiece, seconds: float
) -> None:
    """Keep what the hops that a piece has passed report: timings and relayed links."""
    own = (result.queue_seconds, result.compute_seconds, result.batch_tokens)
    measured = [*result.timings, own][-len(passed) :]
    busy = sum(queue + compute for queue, compute, _ in measured)
    between = max(0.0, seconds - busy) / len(measured)
    for hop, (queue, compute, batch) in zip(passed[-len(measured) :], measured):
        total = queue + compute + between
        hop.timings.append(
            StepTiming(piece.request_id, piece.num_tokens, total, queue, compute, batch)
        )
    for hop, is_relayed in zip(passed[:-1], result.relayed):
        hop.relays_onward = is_relayed
