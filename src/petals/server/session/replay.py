"""What a hop sends when a replay is asked of it: the rows as they were, cut into parts.

Knows messages and tensors; knows no peers and does not touch the session's rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from petals.errors import BadInput, SessionGap
from petals.models.runtime.token_log import TokenLog, split_counts
from petals.server.compute.step_job import StepPlan
from petals.server.session.kv_transfer import KVCopy
from petals.wire.requests import ReplayPart, ReplayRequest


@dataclass(frozen=True, slots=True)
class ReplaySource:
    """What a replay sends: the tokens of ``plan``, of rows as they were when it was asked for.

    outputs: a branch of the session's output log, so that later steps do not change it. kv_copy: of
    a replay of keys and values. reordered: the rows stand as the reorder of the step that is to
    follow has left them.
    """

    request: ReplayRequest
    plan: StepPlan
    reordered: bool
    outputs: TokenLog
    kv_copy: KVCopy | None

    def parts(self, max_tokens: int) -> Iterator[ReplayPart]:
        """The parts, of at most ``max_tokens`` tokens each, without rope lengths. At least one; the
        last one ends it.
        """
        request, plan, num_sent = self.request, self.plan, 0
        # Without base rows every row begins anew: it continues row 0 there, cut to nothing.
        base = (0,) * len(plan.starts) if plan.reorder is None else plan.reorder
        for index, (starts, counts) in enumerate(
            split_counts(plan.starts, plan.counts, max_tokens)
        ):
            num_sent += sum(counts)
            yield ReplayPart(
                header=request.header,
                index=index,
                before_step=request.before_step,
                starts=starts,
                counts=counts,
                reorder=None if index else base,
                next_hops=request.next_hops,
                ends=num_sent >= plan.num_tokens,
                reordered=self.reordered,
                kv=request.kv,
            )


def plan_replay(
    request: ReplayRequest, lengths: tuple[int, ...], reordered_by: int | None
) -> tuple[StepPlan, bool]:
    """Which tokens a replay sends of rows with ``lengths`` tokens, and whether the rows stand as
    the reorder of the step ``request.before_step`` leaves them.

    reordered_by: the step whose reorder the rows show. Raises SessionGap if that is a later step
    (the rows that the replay is about are no more), and BadInput for numbers that do not fit.
    """
    if reordered_by is not None and reordered_by > request.before_step:
        raise SessionGap(
            "A later step has reordered the rows since the replay was asked for.",
            hint="Ask for a new replay.",
        )
    asked, reorder = request.lengths, request.reorder
    is_reordered = reorder is not None and reordered_by == request.before_step
    starts = (0,) * len(lengths) if request.base_rows is None else request.starts
    base_rows = starts if request.base_rows is None else request.base_rows
    try:
        if is_reordered and reorder is not None:
            # The request counts the rows as they were before; here they are reordered already.
            asked = tuple(asked[row] for row in reorder)
        # The step that is to follow may have been run here already and have rolled rows back. It
        # will do so at the receiver, too, so what it has cut off is not missed there.
        rows = zip(asked, lengths, starts, base_rows, strict=True)
        counts = tuple(max(0, min(wanted, length) - start) for wanted, length, start, _ in rows)
    except (IndexError, ValueError):
        raise BadInput(
            f"A replay of {len(request.lengths)} rows was asked for, {len(lengths)} are here.",
            hint="Give a length for every row that the session had before the step.",
        ) from None
    return StepPlan(starts, counts, request.base_rows), is_reordered
