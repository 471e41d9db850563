"""Filling hops with a session's rows: the one procedure behind repair and migration.

Hops are filled segment by segment. The rows come from the hop before them, directly or through the
client; from a hop that is replaced (keys and values); or from the client's own log. Every replay
has an id of its own. Knows rows and hops; chooses neither.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor

from petals.client.routing.failure_policy import misbehaved
from petals.client.session.hop import HopReply, HopSession, next_hops
from petals.client.session.pipeline import SessionContext, expect
from petals.client.session.state import ReplicaProgress
from petals.errors import BadInput, PeerMisbehaved, PeerTimeout, PetalsError, RequestError
from petals.models.runtime.rope_lengths import from_runs, to_runs
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.wire.fields import MAX_ROPE_RUNS
from petals.wire.replies import ForwardFailed, ReplayDone
from petals.wire.requests import ReplayPart, ReplayRequest
from petals.wire.tensors import is_finite


class FillOutcome(Enum):
    """How a filling ended."""

    DONE = "all targets have the rows"
    LINK_DOWN = "a direct link failed; it is closed now, and there is a way around it"
    DONOR_LOST = "the donor is lost, or cannot give the rows"
    REFUSED = "a target is lost, or does not take the rows; its state says why"


@dataclass(frozen=True, slots=True)
class FillGoal:
    """From where to where the rows are brought: from ``have`` (None: nothing) to ``lengths`` tokens
    of each, as they stand before the ``reorder`` of the step ``before_step`` that is to follow.
    """

    lengths: tuple[int, ...]
    before_step: int
    reorder: tuple[int, ...] | None = None
    have: ReplicaProgress | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are missing at most, whether the donor has reordered the rows or not."""
        if self.have is not None:
            return sum(self.have.missing(self.lengths))
        reordered = sum(self.lengths[row] for row in self.reorder or ())
        return max(sum(self.lengths), reordered)


@dataclass(slots=True)
class ReplayBuffer:
    """The parts of a replay that the client itself receives, at most ``max_tokens`` of width
    ``hidden_size``. They begin at ``starts`` (empty: position 0). reordered: the rows stand as the
    reorder of the step to follow leaves them. wrong: why a part cannot be right; empty: none is.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    starts: tuple[int, ...] = ()
    reordered: bool = False
    wrong: str = ""
    _log: TokenLog = field(default_factory=lambda: TokenLog(0))
    _num_parts: int = 0

    def add(self, part: ReplayPart, tensors: Sequence[Tensor]) -> bool:
        """Take the next part. True if no more are to come: this is the last, or it is wrong."""
        if not self._num_parts:
            self._log = TokenLog(len(part.counts))
            self.starts = self.starts or (0,) * len(part.counts)
        num_tokens, come = sum(part.counts), self._log.lengths
        due = tuple(start + length for start, length in zip(self.starts, come))
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if part.index != self._num_parts or part.starts != due or len(part.counts) != len(come):
            self.wrong = "rows that do not follow each other"
        elif sum(come) + num_tokens > self.max_tokens:
            self.wrong = "more rows than were asked for"
        elif shapes != [((num_tokens, self.hidden_size), self.dtype)]:
            self.wrong = "rows of another shape"
        elif not is_finite(tensors[0]):
            self.wrong = "NaN or infinity"
        elif (lengths := _rope_lengths(part)) is None:
            self.wrong = "rope lengths that cannot be"
        else:
            self._log.append(part.counts, tensors[0], lengths)
            self.reordered, self._num_parts = part.reordered, self._num_parts + 1
        return part.ends or bool(self.wrong)

    @property
    def rows(self) -> RowSlices | None:
        """What has come; None for nothing."""
        whole = self._log.whole()
        if whole is None:
            return None
        return RowSlices(self.starts, whole.counts, whole.hidden, whole.rope_lengths)


def _rope_lengths(part: ReplayPart) -> tuple[int, ...] | None:
    """The rope length of each token of a part; None if they cannot be right."""
    try:
        return from_runs(part.starts, part.counts, part.rope_runs)
    except BadInput:
        return None


async def fill(
    context: SessionContext,
    targets: Sequence[HopSession],
    goal: FillGoal,
    donor: HopSession | TokenLog,
    *,
    kv: bool = False,
) -> FillOutcome:
    """Bring the rows of ``targets``, which follow each other, to ``goal``.

    donor: the hop before the first target; with ``kv`` the hop that the only target replaces; or
    the client's log, whose rows stand as after the goal's reorder. Raises OutboxLost if the log was
    dropped.
    """
    rest = list(targets)
    while rest and goal.num_tokens:
        end = 0
        if isinstance(donor, HopSession):
            end = 1 if kv else context.segment_end([donor, *rest]) - 1
        segment = rest[: end or context.segment_end(rest)]
        if end and isinstance(donor, HopSession):
            outcome = await _replay(context, donor, segment, goal, kv=kv)
        else:
            outcome = await _pass_through_client(context, donor, segment, goal)
        if outcome is FillOutcome.DONE:
            donor, rest = segment[-1], rest[len(segment) :]
        elif outcome is FillOutcome.LINK_DOWN and not kv:
            # How much has arrived is not known, so these hops begin anew.
            goal = FillGoal(goal.lengths, goal.before_step, goal.reorder)
        else:
            return outcome
    return FillOutcome.DONE


async def _pass_through_client(
    context: SessionContext,
    donor: HopSession | TokenLog,
    segment: Sequence[HopSession],
    goal: FillGoal,
) -> FillOutcome:
    """Send ``segment`` rows of the client's log, or rows that are fetched from a hop."""
    have = goal.have
    if isinstance(donor, TokenLog):
        reordered = goal.reorder is not None
        rows = donor.since(have.lengths if have else (0,) * len(donor.lengths))
    else:
        starts, spec = have.lengths if have else (), context.spec
        buffer = ReplayBuffer(goal.num_tokens, spec.hidden_size, spec.dtype, starts)
        outcome = await _replay(context, donor, (), goal, buffer)
        if outcome is not FillOutcome.DONE:
            return outcome
        reordered, rows = buffer.reordered, buffer.rows
    if rows is None:
        return FillOutcome.DONE
    limits = [hop.info.max_batch_tokens for hop in segment]
    limits += [context.config.prefill_chunk_tokens, MAX_ROPE_RUNS]
    max_tokens = min(limit for limit in limits if limit)
    parts, num_ahead = list(rows.parts(max_tokens)), context.config.failover.parts_ahead
    order = have.rows if have else (0,) * len(rows.counts)
    for at in range(0, len(parts), num_ahead):
        template = ReplayPart(
            header=segment[0].header(next(context.state.ids)),
            index=0,
            before_step=goal.before_step,
            starts=(),
            counts=(),
            reorder=order,
            next_hops=next_hops(segment[1:]),
            reordered=reordered,
        )
        outcome = await _feed(context, segment, template, parts[at : at + num_ahead])
        if outcome is not FillOutcome.DONE:
            return outcome
        order = tuple(range(len(rows.counts)))
    return FillOutcome.DONE


async def _replay(
    context: SessionContext,
    donor: HopSession,
    segment: Sequence[HopSession],
    goal: FillGoal,
    buffer: ReplayBuffer | None = None,
    *,
    kv: bool = False,
) -> FillOutcome:
    """Let ``donor`` send the rows to the hops of ``segment``, or to the client's ``buffer``."""
    have, request_id = goal.have, next(context.state.ids)
    request = ReplayRequest(
        header=donor.header(request_id),
        before_step=goal.before_step,
        lengths=goal.lengths,
        next_hops=next_hops(segment),
        reorder=goal.reorder,
        starts=have.lengths if have else (),
        base_rows=have.rows if have else None,
        kv=kv,
    )
    line, send = [donor, *segment], partial(donor.send, request)
    return await _exchange(context, line, request, goal.num_tokens, send, buffer)


async def _feed(
    context: SessionContext,
    segment: Sequence[HopSession],
    template: ReplayPart,
    parts: Sequence[RowSlices],
) -> FillOutcome:
    """Send parts as one replay, and wait until the last hop has them."""

    async def send() -> None:
        for index, part in enumerate(parts):
            message = replace(
                template,
                index=index,
                starts=part.starts,
                counts=part.counts,
                rope_runs=to_runs(part.starts, part.counts, part.rope_lengths),
                reorder=None if index else template.reorder,
                ends=index == len(parts) - 1,
            )
            await segment[0].send(message, (part.hidden,))

    num_tokens = sum(sum(part.counts) for part in parts)
    return await _exchange(context, segment, template, num_tokens, send)


async def _exchange(
    context: SessionContext,
    line: Sequence[HopSession],
    message: ReplayRequest | ReplayPart,
    num_tokens: int,
    send: Callable[[], Awaitable[None]],
    buffer: ReplayBuffer | None = None,
) -> FillOutcome:
    """``send`` what begins with ``message`` and wait until it has passed ``line``."""
    donor = line[0] if isinstance(message, ReplayRequest) else None
    is_lost = [hop.state.is_lost for hop in line]
    if any(is_lost):
        return FillOutcome.DONOR_LOST if donor and is_lost[0] else FillOutcome.REFUSED
    seconds = context.timeouts.seconds(num_tokens)
    if len(line) == 1:
        # If the hop is dead, its channel reports that before.
        least = context.config.failover.replay_silence_factor * context.config.silence_timeout
        seconds = max(seconds, least)
    take_part = None if buffer is None else buffer.add
    with expect(line, message.header.request_id, take_part) as pending:
        reply = await pending.receive(seconds, send)
    if reply is not None:
        return _outcome(context, reply, line, donor, buffer)
    if len(line) > 1:
        context.close_links(line)
        return FillOutcome.LINK_DOWN
    line[0].lose(PeerTimeout("A replay was not answered in time."))
    return FillOutcome.DONOR_LOST if donor else FillOutcome.REFUSED


def _outcome(
    context: SessionContext,
    reply: HopReply,
    line: Sequence[HopSession],
    donor: HopSession | None,
    buffer: ReplayBuffer | None,
) -> FillOutcome:
    """What a reply to a replay means. Closes links and gives up hops."""
    hop, index = reply.hop, line.index(reply.hop)
    is_last = index == len(line) - 1
    error: PetalsError = misbehaved(hop.hop, "a reply of another kind")
    match reply.message:
        case ReplayDone(undelivered=()) if is_last and buffer is None:
            return FillOutcome.DONE
        case ReplayPart() if buffer is not None and not buffer.wrong:
            return FillOutcome.DONE
        case ReplayPart() if buffer is not None:
            error = misbehaved(hop.hop, buffer.wrong)
        case ForwardFailed() | ReplayDone() if not is_last:
            context.close_links(line[index : index + 2])
            return FillOutcome.LINK_DOWN
        case PetalsError() as error:
            pass
    if hop is donor:
        if isinstance(error, PeerMisbehaved):
            hop.lose(error)
        return FillOutcome.DONOR_LOST
    if index and isinstance(error, RequestError) and not hop.state.is_lost:
        # The rows came from another server, and the client has not seen them. Next time it does,
        # and knows which of the two is wrong.
        context.close_links(line[index - 1 : index + 1])
        return FillOutcome.LINK_DOWN
    hop.lose(error)
    return FillOutcome.REFUSED
