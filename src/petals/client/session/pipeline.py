"""The hops of one session and how a step gets through them.

States travel along *arcs*: consecutive hops that hand them on to each other; between two arcs they
pass through the client. An answer to a step counts from whichever hop it comes. Knows servers and
reservations; repairs nothing, and knows no rows and no tokens.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession
from petals.client.session.input_log import ReplayMismatch
from petals.client.session.latency import LatencyEstimate
from petals.client.session.pending import PendingReply, Refilling, ReplyFrom
from petals.client.session.reservation import release
from petals.client.session.types import StepCall, StepPiece, StepReply
from petals.client.trace import EdgeTrace, StepTiming, Way
from petals.errors import (
    BadInput,
    OutboxLost,
    PeerError,
    PeerTimeout,
    PetalsError,
    RequestError,
    SessionClosed,
)
from petals.logs import get_logger
from petals.types import Route
from petals.wire.requests import Step

logger = get_logger(__name__)

_SIGNS_PER_LEASE = 3
_MIN_SIGN_SECONDS = 0.05
_LOOK_AGAIN_SECONDS = 0.2
_HUNG_SECONDS = 10.0
_HUNG_FACTOR = 4.0
"""A server that lives may take so long, and so many times what a step's patience is."""
_UNMEASURED_FACTOR = 10.0
_UNMEASURED_TOKENS = 128
"""So often the shortest patience, for every so many tokens, before a route's pace is known."""


class EdgeLost(OutboxLost):
    """Something did not get from one hop to the next; the edge is closed, there is a way around."""


class HopPipeline:
    """Reservations that lead through all blocks of a session; it owns them."""

    def __init__(
        self,
        hops: Sequence[HopSession],
        swarm: SwarmState,
        pace: LatencyEstimate,
        tell_leaving: Callable[[], None],
    ) -> None:
        self.hops = list(hops)
        self.pace = pace
        self._tell_leaving = tell_leaving
        self._swarm = swarm
        self._waiting: dict[int, PendingReply] = {}
        self._tokens_under_way = 0
        self._pieces_pace = LatencyEstimate()
        self.listen_to(self.hops)
        self._keeper = asyncio.create_task(self._keep_alive(), name="signs of life")
        self._closed = False
        swarm.paths.add(self)

    @property
    def route(self) -> Route:
        return tuple(hop.hop for hop in self.hops)

    @property
    def edges(self) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        return tuple(
            EdgeTrace(near.peer_id, far.peer_id, self._way(index, far))
            for index, (near, far) in enumerate(zip(self.hops, self.hops[1:]))
        )

    @property
    def lost(self) -> list[HopSession]:
        """Hops that nothing more will come from."""
        return [hop for hop in self.hops if hop.failure is not None]

    @property
    def leaving(self) -> list[HopSession]:
        """The first of the hops that will go soon, and those behind it that will, too."""
        is_leaving = [hop.leaving_seconds is not None for hop in self.hops]
        start = (*is_leaving, True).index(True)
        end = (*is_leaving, False).index(False, start) if any(is_leaving) else start
        return self.hops[start:end]

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

    async def run(self, pieces: Sequence[StepPiece]) -> None:
        """Get the output of every piece, the hops working on them one behind the other.

        Raises a RequestError that a server answered with, and whatever else stopped it: ``lost``
        tells whether a hop is to blame.
        """
        began = self._now()
        self._tokens_under_way = sum(piece.call.num_tokens for piece in pieces)
        under_way = asyncio.Semaphore(len(self.hops) + 1)
        self._pieces_pace = LatencyEstimate()
        num_done = 0

        async def run(piece: StepPiece) -> None:
            nonlocal num_done
            async with under_way:
                await self._step(piece)
            num_done += piece.call.num_tokens
            self._note_progress(num_done, self._now() - began)

        if len(pieces) == 1:
            await self._step(pieces[0])
        else:
            await _all(run(piece) for piece in pieces)
        self.pace.note(self._tokens_under_way, self._now() - began)

    async def refill(self, refilling: Refilling, send: Callable[[], Awaitable[None]]) -> None:
        """``send`` what sets ``refilling`` off, and wait until the last hop is refilled.

        Raises what a hop refuses with, EdgeLost if it does not get from hop to hop: the edges in
        question are then closed; PeerTimeout if a single hop does not take it.
        """
        line = refilling.line
        for hop in line:
            if hop.failure is not None:
                raise hop.failure
        if self.arc_end(0, line) < len(line):
            raise OutboxLost("The servers cannot hand states to each other.")
        with self._expect(refilling.step_id) as waiting:
            waiting.hops, waiting.refilling = line, refilling
            asked_at = self._now()
            await send()
            heard = await waiting.hear(self.timeout_seconds(refilling.num_tokens))
            while heard is None and len(line) == 1 and line[0].is_mute_since(asked_at):
                # Its channel will soon tell whether it lives; until then nobody else is asked.
                waiting.begin(is_paced=False)
                heard = await waiting.hear(_LOOK_AGAIN_SECONDS)
        if heard is None:
            self._close_edges(line)
            reason = "The replay did not arrive."
            raise EdgeLost(reason) if len(line) > 1 else PeerTimeout(reason)
        hop, answer = heard
        if isinstance(answer, RequestError):
            raise OutboxLost(f"A server cannot take the replay: {answer.message}")
        if isinstance(answer, PetalsError):
            raise self._judged(hop, answer)
        if hop is not line[-1]:
            at = line.index(hop)
            self._close_edges(line[at : at + 2])
            raise EdgeLost("A server could not pass the replay on.")

    def exchange(self, start: int, end: int, hops: Sequence[HopSession]) -> None:
        """Put ``hops`` in the place of hops ``start`` to ``end``, which are let go."""
        old = self.hops[start:end]
        self.hops[start:end] = hops
        self.listen_to(hops)
        for hop in old:
            hop.listener = None
            self._swarm.node.background.start(hop.close(), "letting a lost hop go")

    def listen_to(self, hops: Sequence[HopSession]) -> None:
        """Hear what hops say that are on the path, or are to be."""
        for hop in hops:
            hop.listener = self

    async def begin_epoch(self, epoch: int) -> None:
        """Tell every hop from whom states come now; older frames are dropped from here on, and
        refills under way end.
        """
        for waiting in self._waiting.values():
            if waiting.refilling and not waiting.heard.done():
                waiting.heard.set_result((waiting.hops[0], OutboxLost("The path has changed.")))
        for index, hop in enumerate(self.hops):
            await hop.begin_epoch(epoch, [self.hops[index - 1].peer_id] if index else [])

    def arc_end(self, start: int, hops: Sequence[HopSession] | None = None) -> int:
        """The first hop after ``start`` that its neighbour does not hand states to: of the path's,
        or of ``hops`` one behind the other.
        """
        if not self._swarm.config.use_server_to_server:
            return start + 1
        peers = [hop.peer_id for hop in hops or self.hops]
        return self._swarm.edges.arc_end(peers, start, self._now())

    def _way(self, index: int, far: HopSession) -> Way:
        if self.arc_end(index) == index + 1:
            return Way.VIA_CLIENT
        is_relayed = self._swarm.edges.is_relayed(self.hops[index].peer_id, far.peer_id)
        return Way.RELAYED if is_relayed else Way.DIRECT

    def timeout_seconds(self, num_tokens: int | None = None) -> float:
        """How long silence means nothing while ``num_tokens`` (all under way) are computed."""
        tokens = self._tokens_under_way if num_tokens is None else num_tokens
        shortest = self._swarm.config.step_timeout
        seconds = self.pace.timeout_seconds(tokens)
        if seconds is None:
            seconds = self._pieces_pace.timeout_seconds(tokens)
        if seconds is None:
            seconds = shortest * _UNMEASURED_FACTOR * (1 + tokens / _UNMEASURED_TOKENS)
        return max(shortest, seconds)

    async def close(self) -> None:
        """Free all reservations. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._keeper.cancel()
        self._swarm.paths.discard(self)
        await release(self.hops)

    # What the hops say

    def on_answer(self, hop: HopSession, step_id: int, answer: StepReply | PetalsError) -> None:
        """See ``Listener``. Answers to what nobody waits for any more are dropped."""
        waiting = self._waiting.get(step_id)
        if waiting is None or waiting.heard.done():
            return
        if hop in waiting.hops:
            waiting.heard.set_result((hop, answer))

    def on_replayed(self, hop: HopSession, delivered: bool) -> None:
        """See ``Listener``."""
        for waiting in self._waiting.values():
            if not waiting.refilling or waiting.heard.done():
                continue
            if waiting.hops[-1] is hop or (hop in waiting.hops and not delivered):
                waiting.heard.set_result((hop, None))

    def on_undelivered(self, hop: HopSession, step_id: int, replay: bool) -> None:
        """See ``Listener``. If we wait for it still, the edge is closed and the step repeated."""
        waiting = self._waiting.get(step_id)
        if waiting is None or waiting.heard.done() or hop not in waiting.hops[:-1]:
            return
        if replay == (waiting.refilling is not None) and hop not in waiting.reported_loss:
            waiting.reported_loss.add(hop)
            at = waiting.hops.index(hop)
            self._close_edges(waiting.hops[at : at + 2])
            waiting.heard.set_result((hop, EdgeLost("The channel between two servers broke.")))

    def on_outputs(self, hop: HopSession, step: Step, tensors: Sequence[Tensor]) -> None:
        """See ``Listener``."""
        waiting = self._waiting.get(step.step_id)
        if waiting is None or waiting.heard.done() or hop not in waiting.hops:
            return
        fetched = None if waiting.refilling is None else waiting.refilling.fetched
        if fetched is None:
            return
        try:
            fetched.add(step, tensors)
        except ReplayMismatch as error:
            waiting.heard.set_result((hop, hop.misbehaved(str(error))))
            return
        if step.ends:
            waiting.heard.set_result((hop, None))

    def on_lost(self, hop: HopSession) -> None:
        """See ``Listener``."""
        for waiting in self._waiting.values():
            if hop in waiting.hops and not waiting.heard.done():
                waiting.heard.set_result((hop, hop.failure))

    def on_leaving(self, hop: HopSession) -> None:
        """See ``Listener``."""
        self._swarm.note_leaving(hop.peer_id, hop.leaving_seconds or 0.0)
        self._tell_leaving()

    # One step

    async def _step(self, piece: StepPiece) -> None:
        hidden, at = piece.hidden, 0
        with self._expect(piece.call.step_id) as waiting:
            while at < len(self.hops):
                began, end = self._now(), self.arc_end(at)
                waiting.hops = self.hops[at:]
                heard = await self._ask(waiting, piece.call, hidden, self.hops[at:end])
                if heard is None:
                    # All of them live: between two of them something does not pass.
                    self._close_edges(self.hops[at:end])
                    continue
                hop, answer = heard
                if isinstance(answer, EdgeLost):
                    continue
                index = self.hops.index(hop)
                if not isinstance(answer, StepReply):
                    if isinstance(answer, BadInput) and index > at:
                        # We checked what went in, so it was spoilt by the hop that handed it on.
                        hop = self.hops[index - 1]
                        answer = hop.misbehaved(f"states that its neighbour refused: {answer}")
                    raise self._judged(hop, answer)
                hidden = self._checked(hop, answer, hidden)
                self._note_timings(at, index, piece.call, answer, self._now() - began)
                passed = zip(pairwise(self.hops[at : index + 1]), answer.result.relayed)
                for (near, far), is_relayed in passed:
                    self._swarm.edges.note_way(near.peer_id, far.peer_id, is_relayed)
                if answer.result.undelivered:
                    self._close_edges(self.hops[index : index + 2])
                at = index + 1
        piece.output = hidden

    async def _ask(
        self, waiting: PendingReply, call: StepCall, hidden: Tensor, arc: Sequence[HopSession]
    ) -> ReplyFrom | None:
        """Send a step along an arc. None if nobody answers an arc of several hops.

        Raises PeerTimeout if a single one does not answer.
        """
        hop = arc[0]
        if hop.failure is not None:
            raise hop.failure
        waiting.begin(is_paced=len(arc) > 1)
        await hop.send(call, hidden, tuple(later.hop for later in arc[1:]))
        if waiting.is_paced:
            return await waiting.hear(self.timeout_seconds())
        seconds = self._swarm.config.request_timeout
        patience = max(_HUNG_SECONDS, _HUNG_FACTOR * self.timeout_seconds())
        look = self._swarm.node.clock.call_later(
            patience, partial(self._leave_if_hung, hop, patience)
        )
        try:
            heard = await waiting.hear(seconds)
        finally:
            look.cancel()
        if heard is None:
            hop.fail(PeerTimeout(f"No answer to a step within {seconds:g} s."))
            assert hop.failure is not None
            raise hop.failure
        return heard

    def _leave_if_hung(self, hop: HopSession, seconds: float) -> None:
        """It lives and should have answered long ago: that is no reason to wait if somebody else,
        measured and with room, can take its place.
        """
        room = hop.terms.cache_tokens
        if self._swarm.alternative_seconds(hop.hop, room) is not None:
            hop.is_straggler = True
            hop.fail(PeerTimeout(f"It lives, but has not answered a step within {seconds:.0f} s."))

    def _note_progress(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of the pieces under way are through: now we know how long silence of the
        others means nothing.
        """
        self._pieces_pace.note(num_tokens, seconds)
        for waiting in self._waiting.values():
            if waiting.is_paced:
                waiting.limit(self.timeout_seconds())

    def _checked(self, hop: HopSession, answer: StepReply, hidden: Tensor) -> Tensor:
        try:
            return hop.checked(answer, hidden)
        except PeerError as error:
            hop.fail(error)
            raise

    def _close_edges(self, hops: Sequence[HopSession]) -> None:
        """These neighbours hand nothing to each other for a while."""
        for near, far in zip(hops, hops[1:]):
            logger.debug(
                "…%s to …%s goes through us for a while", near.peer_id[-6:], far.peer_id[-6:]
            )
            self._swarm.edges.close(near.peer_id, far.peer_id, self._now())

    def _judged(self, hop: HopSession, error: PetalsError | None) -> PetalsError:
        """A refusal, or a loss of ``hop``."""
        assert error is not None
        if isinstance(error, PeerError | SessionClosed):
            hop.fail(error)
        return error

    def _note_timings(
        self, first: int, last: int, call: StepCall, answer: StepReply, seconds: float
    ) -> None:
        """What the hops from ``first`` to ``last`` measured; they share the time in between."""
        result = answer.result
        own = (result.queue_seconds, result.compute_seconds, result.batch_tokens)
        measured = [*result.timings, own][first - last - 1 :]
        busy = sum(queue + compute for queue, compute, _ in measured)
        between = max(0.0, seconds - busy) / len(measured)
        for hop, (queue, compute, batch) in zip(
            self.hops[last + 1 - len(measured) : last + 1], measured
        ):
            total = queue + compute + between
            hop.timings.append(
                StepTiming(call.step_id, call.num_tokens, total, queue, compute, batch)
            )

    @contextmanager
    def _expect(self, step_id: int) -> Iterator[PendingReply]:
        waiting = PendingReply(self._swarm.node.clock)
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


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at the same time; the first failure ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
