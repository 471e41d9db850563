"""How the pieces of a step get through the hops of a session.

States travel along direct segments: consecutive hops that forward to each other; between two
segments they pass through the client. A piece is answered by whichever hop has the output. What
stops a piece is written into the state of the hop that is to blame. Repairs nothing.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from petals.client.routing.latency import StepTimeouts
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession, next_hops
from petals.client.session.replies import HopReply, PendingReply, Replies
from petals.client.session.state import SessionState
from petals.client.session.types import StepPiece
from petals.client.trace import EdgeTrace, StepTiming, Way
from petals.errors import PeerMisbehaved, PeerTimeout, PetalsError, RequestError
from petals.logs import get_logger
from petals.swarm.background import gather_bounded
from petals.wire.replies import ForwardFailed, StepResult
from petals.wire.requests import Step

logger = get_logger(__name__)


class DirectSegments:
    """Which hops forward to each other now."""

    def __init__(self, swarm: SwarmState) -> None:
        self._swarm = swarm

    def end(self, hops: Sequence[HopSession], start: int = 0) -> int:
        """The first hop after ``start`` that its predecessor does not forward to."""
        if not self._swarm.config.use_server_to_server:
            return start + 1
        peers = [hop.peer_id for hop in hops]
        return self._swarm.edges.run_end(peers, start, self._swarm.node.clock.monotonic())

    def close(self, hops: Sequence[HopSession]) -> None:
        """For some time, states go through the client between each two of these hops."""
        for near, far in pairwise(hops):
            logger.debug("…%s to …%s goes through the client", near.peer_id[-6:], far.peer_id[-6:])
            self._swarm.edges.close(near.peer_id, far.peer_id, self._swarm.node.clock.monotonic())

    def edges(self, hops: Sequence[HopSession]) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        return tuple(
            EdgeTrace(near.peer_id, far.peer_id, self._way(near, far))
            for near, far in pairwise(hops)
        )

    def _way(self, near: HopSession, far: HopSession) -> Way:
        if self.end([near, far]) == 1:
            return Way.VIA_CLIENT
        is_relayed = self._swarm.edges.is_relayed(near.peer_id, far.peer_id)
        return Way.RELAYED if is_relayed else Way.DIRECT


class HopPipeline:
    """Runs pieces through ``state.legs``."""

    def __init__(
        self,
        state: SessionState,
        swarm: SwarmState,
        replies: Replies,
        timeouts: StepTimeouts,
        segments: DirectSegments,
    ) -> None:
        self._state = state
        self._swarm = swarm
        self._replies = replies
        self._timeouts = timeouts
        self._segments = segments

    async def run(self, pieces: Sequence[StepPiece]) -> None:
        """Get the outputs of all pieces, the hops working on them one behind the other.

        A piece without output afterwards was stopped by a hop that is lost now. Raises
        RequestTooLarge.
        """
        began, num_done = self._now(), 0
        self._timeouts.begin(sum(piece.num_tokens for piece in pieces))

        async def run(piece: StepPiece) -> None:
            nonlocal num_done
            piece.output = None
            if await self._run_piece(piece):
                num_done += piece.num_tokens
                self._timeouts.note_progress(num_done, self._now() - began)
                self._replies.limit(self._timeouts.seconds())

        if len(pieces) == 1:
            await run(pieces[0])
        else:
            works = [partial(run, piece) for piece in pieces]
            await gather_bounded(works, len(self._state.legs) + 1)
        if all(piece.output is not None for piece in pieces):
            self._timeouts.end(self._now() - began)

    async def _run_piece(self, piece: StepPiece) -> bool:
        """True if the piece has its output; else a hop is lost."""
        legs, hidden, at = self._state.legs, piece.rows.hidden, 0
        with self._replies.expect(legs, piece.request_id) as pending:
            while at < len(legs):
                began, end = self._now(), self._segments.end(legs, at)
                pending.hops = legs[at:]
                reply = await self._ask(pending, piece, hidden, legs[at:end])
                if reply is None:
                    if end == at + 1:
                        return False
                    # All of them live: between two of them something does not pass.
                    self._segments.close(legs[at:end])
                    continue
                index = legs.index(reply.hop)
                if isinstance(reply.message, ForwardFailed):
                    self._segments.close(legs[index : index + 2])
                    continue
                output = self._output(reply, hidden)
                if isinstance(output, Tensor):
                    self._note(reply, legs[at : index + 1], piece, self._now() - began)
                    if isinstance(reply.message, StepResult) and reply.message.undelivered:
                        self._segments.close(legs[index : index + 2])
                    hidden, at = output, index + 1
                elif index > at and _is_doubtful(reply.hop, output):
                    # The input came from the hop before, and the client has not seen it. Next time
                    # it does, and knows which of the two is wrong.
                    self._segments.close(legs[index - 1 : index + 1])
                else:
                    reply.hop.lose(output)
                    return False
        piece.output = hidden
        return True

    async def _ask(
        self,
        pending: PendingReply,
        piece: StepPiece,
        hidden: Tensor,
        segment: Sequence[HopSession],
    ) -> HopReply | None:
        """Send a piece along a segment. None if no hop answers; a single one is then lost."""
        first, rows = segment[0], piece.rows
        message = Step(
            header=first.header(piece.request_id),
            starts=rows.starts,
            counts=rows.counts,
            reorder=piece.reorder,
            next_hops=next_hops(segment[1:]),
        )
        send = partial(first.send, message, (hidden,))
        pending.is_paced = len(segment) > 1
        if pending.is_paced:
            return await pending.receive(self._timeouts.seconds(), send)
        seconds, hung_seconds = self._swarm.config.request_timeout, self._timeouts.hung_seconds()
        look = self._swarm.node.clock.call_later(
            hung_seconds, partial(self._leave_if_hung, first, hung_seconds)
        )
        try:
            reply = await pending.receive(seconds, send)
        finally:
            look.cancel()
        if reply is None:
            first.lose(PeerTimeout(f"No answer to a step within {seconds:g} s."))
        return reply

    def _leave_if_hung(self, hop: HopSession, seconds: float) -> None:
        """A hop that answers pings but not the step is left, if another server that was measured
        and has room can take its place; else waiting is all that can be done.
        """
        if self._swarm.alternative_seconds(hop.hop, hop.cache_tokens) is not None:
            hop.leave_as_slow(f"It lives, but has not answered a step within {seconds:.0f} s.")

    def _output(self, reply: HopReply, hidden: Tensor) -> Tensor | PetalsError:
        """The output that a reply brings, or what is wrong with the reply."""
        if isinstance(reply.message, PetalsError):
            return reply.message
        if not isinstance(reply.message, StepResult):
            return reply.hop.misbehaved("something else than an output")
        try:
            return reply.hop.checked(reply.tensors, hidden)
        except PeerMisbehaved as error:
            return error

    def _note(
        self, reply: HopReply, passed: Sequence[HopSession], piece: StepPiece, seconds: float
    ) -> None:
        """Keep what the hops that a piece has passed report: timings and relayed links."""
        result = reply.message
        assert isinstance(result, StepResult)
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
            self._swarm.edges.note_way(near.peer_id, far.peer_id, is_relayed)

    def _now(self) -> float:
        return self._swarm.node.clock.monotonic()


def _is_doubtful(hop: HopSession, error: PetalsError) -> bool:
    """Whether the hop before ``hop`` may be the one to blame."""
    return not hop.state.is_lost and isinstance(error, RequestError | PeerMisbehaved)
