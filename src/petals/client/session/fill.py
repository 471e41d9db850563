"""Filling hops with a session's rows: the one procedure behind repair, migration and rebuild.

Hops are filled segment by segment. The rows come from the hop before them, straight or through the
client; from a hop that is replaced (keys and values); or from the client's own log. Every replay
has an id of its own. Knows rows and hops; chooses neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from petals.client.routing.latency import StepTimeouts
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession, next_hops
from petals.client.session.pipeline import DirectSegments
from petals.client.session.replies import HopReply, ReplayBuffer, Replies
from petals.client.session.state import SessionState
from petals.client.session.types import ReplicaProgress, SessionSpec
from petals.errors import PeerMisbehaved, PeerTimeout, PetalsError, RequestError
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.wire.header import RequestHeader
from petals.wire.replies import ForwardFailed, ReplayDone
from petals.wire.requests import ReplayPart, ReplayRequest

_SILENCE_FACTOR = 1.5
"""A single hop has at least this many times ``silence_timeout`` to answer a replay: if it is dead,
its channel reports that before.
"""


class FillOutcome(Enum):
    """How a filling ended."""

    DONE = "all targets have the rows"
    LINK_DOWN = "a direct link failed; it is closed now, and there is a way around it"
    DONOR_LOST = "the donor is lost, or cannot give the rows"
    REFUSED = "a target is lost, or does not take the rows; its state says why"


@dataclass(frozen=True, slots=True)
class FillGoal:
    """Where the rows are to stand: ``lengths`` tokens of each, before the ``reorder`` of the step
    ``before_step`` that is to follow.
    """

    lengths: tuple[int, ...]
    before_step: int
    reorder: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are sent at most, whether the donor has reordered the rows already or not."""
        reordered = sum(self.lengths[row] for row in self.reorder or ())
        return max(sum(self.lengths), reordered)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows in the client's hands. reordered: as the reorder of the step to follow leaves them."""

    rows: RowSlices | None
    num_rows: int
    reordered: bool


class HopFiller:
    """Fills hops of one session, which may but need not be part of its route."""

    def __init__(
        self,
        state: SessionState,
        swarm: SwarmState,
        spec: SessionSpec,
        replies: Replies,
        timeouts: StepTimeouts,
        segments: DirectSegments,
    ) -> None:
        self._ids = state.ids
        self._config = swarm.config
        self._spec = spec
        self._replies = replies
        self._timeouts = timeouts
        self._segments = segments

    async def fill(
        self,
        targets: Sequence[HopSession],
        have: ReplicaProgress | None,
        goal: FillGoal,
        donor: HopSession | TokenLog,
        *,
        kv: bool = False,
    ) -> FillOutcome:
        """Bring ``targets``, which follow each other, from ``have`` (None: nothing) to ``goal``.

        donor: the hop before the first target; with ``kv`` the hop that the only target replaces;
        or the client's log, whose rows stand as after the goal's reorder. Raises OutboxLost if the
        log was dropped.
        """
        rest = list(targets)
        if not any(have.missing(goal.lengths) if have else goal.lengths):
            return FillOutcome.DONE
        while rest:
            end = 0
            if isinstance(donor, HopSession):
                end = 1 if kv else self._segments.end([donor, *rest]) - 1
            if end and isinstance(donor, HopSession):
                segment = rest[:end]
                outcome = await self._replay(donor, segment, have, goal, kv)
            else:
                segment = rest[: self._segments.end(rest)]
                outcome = await self._pass_through_client(donor, segment, have, goal)
            if outcome is FillOutcome.DONE:
                donor, rest = segment[-1], rest[len(segment) :]
            elif outcome is FillOutcome.LINK_DOWN and not kv:
                # How much has arrived is not known, so these hops begin anew.
                have = None
            else:
                return outcome
        return FillOutcome.DONE

    async def _replay(
        self,
        donor: HopSession,
        segment: Sequence[HopSession],
        have: ReplicaProgress | None,
        goal: FillGoal,
        kv: bool,
    ) -> FillOutcome:
        """Let ``donor`` send the rows to the hops of ``segment``."""
        line = [donor, *segment]
        request_id = next(self._ids)
        request = self._request(donor.header(request_id), segment, have, goal, kv)
        with self._replies.expect(line, request_id) as pending:
            seconds = self._seconds(goal.num_tokens, line)
            reply = await pending.receive(seconds, partial(donor.send, request))
        return self._outcome(reply, line, donor)

    async def _pass_through_client(
        self,
        donor: HopSession | TokenLog,
        segment: Sequence[HopSession],
        have: ReplicaProgress | None,
        goal: FillGoal,
    ) -> FillOutcome:
        """Send ``segment`` rows of the client's log, or rows that are fetched from a hop."""
        if isinstance(donor, TokenLog):
            starts = have.lengths if have else (0,) * len(donor.lengths)
            source = _Rows(donor.since(starts), len(starts), goal.reorder is not None)
        else:
            fetched = await self._fetch(donor, have, goal)
            if isinstance(fetched, FillOutcome):
                return fetched
            source = fetched
        order = have.rows if have else (0,) * source.num_rows
        limits = [hop.info.max_batch_tokens for hop in segment]
        limits.append(self._config.prefill_chunk_tokens)
        max_tokens = min(limit for limit in limits if limit)
        parts = [] if source.rows is None else list(source.rows.parts(max_tokens))
        num_ahead = self._config.failover.parts_ahead
        for at in range(0, len(parts), num_ahead):
            some = parts[at : at + num_ahead]
            outcome = await self._feed(segment, some, order, goal.before_step, source.reordered)
            if outcome is not FillOutcome.DONE:
                return outcome
            order = tuple(range(source.num_rows))
        return FillOutcome.DONE

    async def _feed(
        self,
        segment: Sequence[HopSession],
        parts: Sequence[RowSlices],
        order: tuple[int, ...],
        before_step: int,
        reordered: bool,
    ) -> FillOutcome:
        """Send parts as one replay, and wait until the last hop has them."""
        first, request_id = segment[0], next(self._ids)

        async def send() -> None:
            for index, part in enumerate(parts):
                message = ReplayPart(
                    header=first.header(request_id),
                    index=index,
                    before_step=before_step,
                    starts=part.starts,
                    counts=part.counts,
                    reorder=None if index else order,
                    next_hops=next_hops(segment[1:]),
                    ends=index == len(parts) - 1,
                    reordered=reordered,
                )
                await first.send(message, (part.hidden,))

        with self._replies.expect(segment, request_id) as pending:
            num_tokens = sum(sum(part.counts) for part in parts)
            reply = await pending.receive(self._seconds(num_tokens, segment), send)
        return self._outcome(reply, segment, None)

    async def _fetch(
        self, donor: HopSession, have: ReplicaProgress | None, goal: FillGoal
    ) -> _Rows | FillOutcome:
        """The rows of a hop that cannot send them to the next one itself; checked here."""
        buffer = ReplayBuffer(
            goal.num_tokens,
            self._spec.hidden_size,
            self._spec.dtype,
            have.lengths if have else (),
        )
        request_id = next(self._ids)
        request = self._request(donor.header(request_id), (), have, goal, False)
        with self._replies.expect([donor], request_id, buffer) as pending:
            seconds = self._seconds(goal.num_tokens, [donor])
            reply = await pending.receive(seconds, partial(donor.send, request))
        if reply is not None and isinstance(reply.message, ReplayPart):
            return _Rows(buffer.rows, buffer.num_rows, buffer.reordered)
        return self._outcome(reply, [donor], donor)

    def _request(
        self,
        header: RequestHeader,
        segment: Sequence[HopSession],
        have: ReplicaProgress | None,
        goal: FillGoal,
        kv: bool,
    ) -> ReplayRequest:
        return ReplayRequest(
            header=header,
            before_step=goal.before_step,
            lengths=goal.lengths,
            next_hops=next_hops(segment),
            reorder=goal.reorder,
            starts=have.lengths if have else (),
            base_rows=have.rows if have else None,
            kv=kv,
        )

    def _seconds(self, num_tokens: int, line: Sequence[HopSession]) -> float:
        """How long a replay may take. A single hop has the time to be found dead by its channel."""
        seconds = self._timeouts.seconds(num_tokens)
        if len(line) > 1:
            return seconds
        return max(seconds, _SILENCE_FACTOR * self._config.silence_timeout)

    def _outcome(
        self, reply: HopReply | None, line: Sequence[HopSession], donor: HopSession | None
    ) -> FillOutcome:
        """What a reply to a replay, or its absence, means. Closes links, gives up hops."""
        if reply is None:
            if len(line) > 1:
                self._segments.close(line)
                return FillOutcome.LINK_DOWN
            line[0].lose(PeerTimeout("A replay was not answered in time."))
            return FillOutcome.REFUSED if donor is None else FillOutcome.DONOR_LOST
        hop, message = reply.hop, reply.message
        index = line.index(hop)
        if isinstance(message, ReplayDone) and not message.undelivered and hop is line[-1]:
            return FillOutcome.DONE
        if isinstance(message, ForwardFailed | ReplayDone) and hop is not line[-1]:
            self._segments.close(line[index : index + 2])
            return FillOutcome.LINK_DOWN
        error = message if isinstance(message, PetalsError) else hop.misbehaved("a wrong reply")
        if hop is donor:
            if isinstance(error, PeerMisbehaved):
                hop.lose(error)
            return FillOutcome.DONOR_LOST
        if index and isinstance(error, RequestError) and not hop.state.is_lost:
            # The rows came from another server, and the client has not seen them. Next time it
            # does, and knows which of the two is wrong.
            self._segments.close(line[index - 1 : index + 1])
            return FillOutcome.LINK_DOWN
        hop.lose(error)
        return FillOutcome.REFUSED
