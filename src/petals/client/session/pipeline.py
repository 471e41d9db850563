"""How the pieces of a step get through the hops of a session.

States travel along direct segments: consecutive hops that forward to each other; between two
segments they pass through the client. A piece is answered by whichever hop has the output. What
stops a piece is written into the state of the hop that is to blame. Repairs nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from math import inf

from torch import Tensor

from petals.client.session.context import SessionContext
from petals.client.session.hop import HopSession, next_hops
from petals.client.session.replies import HopReply, PendingReply
from petals.client.session.types import StepPiece
from petals.client.trace import StepTiming
from petals.errors import PeerMisbehaved, PeerTimeout, PetalsError, RequestError
from petals.swarm.background import gather_bounded
from petals.wire.replies import ForwardFailed, StepResult
from petals.wire.requests import Step


async def run_pieces(context: SessionContext, pieces: Sequence[StepPiece]) -> bool:
    """Get the outputs of all pieces, the hops working on them one behind the other.

    False: some have none, and a hop is lost. Raises RequestTooLarge.
    """
    timeouts, began, num_done = context.timeouts, context.now, 0
    timeouts.begin(sum(piece.num_tokens for piece in pieces))
    order = _PieceOrder(len(pieces))

    async def run(number: int, piece: StepPiece) -> None:
        nonlocal num_done
        piece.output = None
        try:
            await _run_piece(context, piece, partial(order.turn, number))
        finally:
            order.end(number)
        if piece.output is not None:
            num_done += piece.num_tokens
            timeouts.note_progress(num_done, context.now - began)
            context.replies.limit(timeouts.seconds())

    if len(pieces) == 1:
        await run(0, pieces[0])
    else:
        works = [partial(run, number, piece) for number, piece in enumerate(pieces)]
        await gather_bounded(works, len(context.state.legs) + 1)
    is_done = all(piece.output is not None for piece in pieces)
    if is_done:
        timeouts.end(context.now - began)
    return is_done


class _PieceOrder:
    """Lets the client send pieces to each hop in their order, also when it takes over from a direct
    link that has failed with several pieces under way.
    """

    def __init__(self, num_pieces: int) -> None:
        self._reached = [-1.0] * num_pieces
        """The last hop that each piece has been sent to."""
        self._moved = asyncio.Event()

    async def turn(self, number: int, hop: int) -> None:
        """Return once the piece before has been sent to ``hop``; the next thing is to send this."""
        while number and self._reached[number - 1] < hop:
            self._moved = asyncio.Event() if self._moved.is_set() else self._moved
            await self._moved.wait()
        self._reach(number, hop)

    def end(self, number: int) -> None:
        """A piece is sent to no hop any more."""
        self._reach(number, inf)

    def _reach(self, number: int, hop: float) -> None:
        self._reached[number] = max(self._reached[number], hop)
        self._moved.set()


async def _run_piece(
    context: SessionContext, piece: StepPiece, turn: Callable[[int], Awaitable[None]]
) -> None:
    legs, hidden, at = context.state.legs, piece.rows.hidden, 0
    ids = [leg.session_id for leg in legs]
    with context.replies.expect([leg.header(piece.request_id) for leg in legs]) as pending:
        while at < len(legs):
            await turn(at)
            if any(leg.state.is_lost for leg in legs[at:]):
                return
            began, end = context.now, context.segment_end(legs, at)
            pending.session_ids = ids[at:]
            reply = await _ask(context, pending, piece, hidden, legs[at:end])
            if reply is None:
                # All of a segment live: between two of them something does not pass. A single hop
                # is lost now.
                context.close_links(legs[at:end])
                continue
            index = ids.index(reply.session_id)
            hop, output = legs[index], _output(legs[index], reply, hidden)
            if isinstance(output, Tensor) and isinstance(reply.message, StepResult):
                _note(context, reply.message, legs[at : index + 1], piece, context.now - began)
                if reply.message.undelivered:
                    context.close_links(legs[index : index + 2])
                hidden, at = output, index + 1
            elif output is None:
                context.close_links(legs[index : index + 2])
            elif index > at and isinstance(output, RequestError | PeerMisbehaved):
                # The input came from the hop before, and the client has not seen it. Next time it
                # does, and knows which of the two is wrong.
                context.close_links(legs[index - 1 : index + 1])
            else:
                hop.lose(output)
    piece.output = hidden


async def _ask(
    context: SessionContext,
    pending: PendingReply,
    piece: StepPiece,
    hidden: Tensor,
    segment: Sequence[HopSession],
) -> HopReply | None:
    """Send a piece along a segment. None if no hop answers; a single one is then lost."""
    hop, rows = segment[0], piece.rows
    message = Step(
        header=hop.header(piece.request_id),
        starts=rows.starts,
        counts=rows.counts,
        reorder=piece.reorder,
        next_hops=next_hops(segment[1:]),
    )
    send = partial(hop.send, message, (hidden,))
    pending.is_paced = len(segment) > 1
    if pending.is_paced:
        return await pending.receive(context.timeouts.seconds(), send)
    seconds, hung_seconds = context.config.request_timeout, context.timeouts.hung_seconds()

    def leave_if_hung() -> None:
        # It answers pings but not the step. Where no other server that was measured and has room
        # can take its place, waiting is all that can be done.
        if context.swarm.alternative_seconds(hop.hop, hop.cache_tokens) is not None:
            hop.leave_as_slow(f"It lives, but has not answered a step in {hung_seconds:.0f} s.")

    look = context.swarm.node.clock.call_later(hung_seconds, leave_if_hung)
    try:
        reply = await pending.receive(seconds, send)
    finally:
        look.cancel()
    if reply is None:
        hop.lose(PeerTimeout(f"No answer to a step within {seconds:g} s."))
    return reply


def _output(hop: HopSession, reply: HopReply, hidden: Tensor) -> Tensor | PetalsError | None:
    """The output that a reply brings, or what is wrong with it; None: the next hop lacks it."""
    match reply.message:
        case StepResult():
            try:
                return hop.checked(reply.tensors, hidden)
            except PeerMisbehaved as error:
                return error
        case ForwardFailed():
            return None
        case PetalsError() as error:
            return error
    return hop.misbehaved("something else than an output")


def _note(
    context: SessionContext,
    result: StepResult,
    passed: Sequence[HopSession],
    piece: StepPiece,
    seconds: float,
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
    for (near, far), is_relayed in zip(pairwise(passed), result.relayed):
        context.swarm.edges.note_way(near.peer_id, far.peer_id, is_relayed)
