"""A step of a session, decode or prefill: its plan, and the job that runs it.

``plan_step`` checks a step against the lengths of the session's rows; ``StepJob`` runs the plan in
runs of tokens that fit a batch. Knows KV rows; knows no messages, no peers and no scheduling.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from petals.errors import BadInput, BatchTooLarge, LengthExceeded, SessionGap
from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.batch import Segment
from petals.models.runtime.rope_lengths import RopeRuns, from_runs
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import BatchableJob
from petals.server.compute.kv_pool import SessionKV
from petals.types import BlockSpan
from petals.wire.tensors import narrowed

MAX_DECODE_TOKENS_PER_ROW = 16
"""Most new tokens in a row of a decode step: one token, or a speculation to be verified."""

MAX_DECODE_TOKENS = 128
"""Most new tokens of a decode step, all rows together. A larger step is a prefill."""

GROWTH_TOKENS = 256
"""A session opened without a maximum length extends its reservation by this many tokens a row."""


@dataclass(frozen=True)
class StepPlan:
    """One checked step: row r runs ``counts[r]`` tokens from position ``starts[r]``.

    ``reorder[r]`` is the old row that new row r continues; None leaves the rows as they are.
    Packed, the tokens of the step are those of row 0, then those of row 1, and so on; ``rope_runs``
    are their rope lengths, as a message brings them.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    reorder: tuple[int, ...] | None = None
    rope_runs: RopeRuns = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def is_decode(self) -> bool:
        """Whether the step is short enough to run whole, before prefills."""
        is_short = max(self.counts, default=0) <= MAX_DECODE_TOKENS_PER_ROW
        return is_short and self.num_tokens <= MAX_DECODE_TOKENS

    @property
    def lengths_after(self) -> tuple[int, ...]:
        """Tokens in every row after the step."""
        return tuple(start + count for start, count in zip(self.starts, self.counts))

    @cached_property
    def rope_lengths(self) -> tuple[int, ...]:
        """The rope length of each token of the step. Raises BadInput for runs that cannot be."""
        return from_runs(self.starts, self.counts, self.rope_runs)

    def pieces(self, done: int, num_tokens: int) -> Iterator["TokenRun"]:
        """Packed tokens ``[done, done + num_tokens)`` as runs of consecutive tokens of one row."""
        first, end = 0, done + num_tokens
        for row, (start, count) in enumerate(zip(self.starts, self.counts)):
            low, high = max(first, done), min(first + count, end)
            if low < high:
                yield TokenRun(row, start + low - first, low, high - low)
            first += count


@dataclass(frozen=True, slots=True)
class TokenRun:
    """``count`` consecutive tokens of ``row`` from position ``start``.

    ``offset``: index of the first of them among the packed tokens of the step.
    """

    row: int
    start: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The limits a session was opened with: rows, tokens per row, tokens per step."""

    max_rows: int
    max_length: int
    max_step_tokens: int


def plan_step(
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    reorder: tuple[int, ...] | None,
    lengths: tuple[int, ...],
    limits: StepLimits,
    rope_runs: RopeRuns = (),
) -> StepPlan:
    """Check a step against the present ``lengths`` of its session's rows.

    Raises BadInput (starts, counts, reorder and rope lengths that contradict each other),
    BatchTooLarge (rows or tokens), SessionGap (a row would start behind its end) or LengthExceeded.
    """
    if reorder is not None:
        if any(row >= len(lengths) for row in reorder) or not reorder:
            raise BadInput(
                f"The reorder {list(reorder)[:8]} does not fit a session of {len(lengths)} rows.",
                hint="Every entry of a reorder is the index of a row the session has now.",
            )
        lengths = tuple(lengths[row] for row in reorder)
    if len(lengths) > limits.max_rows:
        raise BatchTooLarge(
            f"The session would grow to {len(lengths)} rows; this server takes {limits.max_rows}.",
            hint="Use a smaller batch or fewer beams.",
        )
    if not len(starts) == len(counts) == len(lengths):
        raise BadInput(
            f"{len(starts)} starts and {len(counts)} counts came for {len(lengths)} rows.",
            hint="Give one start and one count for every row; a row may have count 0.",
        )
    for row, (start, length) in enumerate(zip(starts, lengths)):
        if start > length:
            raise SessionGap(
                f"Row {row} ends at token {length}, the step begins at {start}.",
                hint="Send the tokens in between first.",
            )
    plan = StepPlan(starts, counts, reorder, rope_runs)
    _check_size(plan, limits)
    longest = max(plan.rope_lengths, default=0)
    if longest > limits.max_length:
        raise LengthExceeded(
            f"A rope length is {longest}; the session takes {limits.max_length} tokens.",
            hint="It is the length of the row after the forward that the token belongs to.",
        )
    return plan


def _check_size(plan: StepPlan, limits: StepLimits) -> None:
    longest = max(plan.lengths_after, default=0)
    if longest > limits.max_length:
        raise LengthExceeded(
            f"Maximum length exceeded: a row would grow to {longest} tokens; the session takes "
            f"{limits.max_length}.",
            hint="Open the session with a larger max_length.",
        )
    if plan.num_tokens > limits.max_step_tokens:
        raise BatchTooLarge(
            f"{plan.num_tokens} tokens in one step, the limit is {limits.max_step_tokens}.",
            hint="Send the tokens in several steps.",
        )


@dataclass(eq=False)
class StepJob(BatchableJob[Tensor]):
    """A checked step; its result is [plan.num_tokens, H] in ``out_dtype`` on the CPU.

    hidden: [plan.num_tokens, H], floating, on the CPU. prompts [len(blocks), P, H] and adapter are
    on the device. The job alone uses the rows of ``kv`` until it is done or aborted; ``has_begun``
    says whether it has reordered or cut them.
    """

    kv: SessionKV
    blocks: BlockSpan
    plan: StepPlan
    hidden: Tensor
    out_dtype: torch.dtype
    owner: str
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    has_begun: bool = field(default=False, init=False)
    _num_done: int = field(default=0, init=False)
    _outputs: list[Tensor] = field(default_factory=list, init=False)

    @property
    def session(self) -> Hashable:
        """See BatchableJob."""
        return id(self.kv)

    @property
    def cost_tokens(self) -> int:
        """See Job."""
        return self.plan.num_tokens

    @property
    def is_urgent(self) -> bool:
        """See Job."""
        return self.plan.is_decode

    @property
    def is_done(self) -> bool:
        """See Job."""
        return self._num_done >= self.plan.num_tokens

    def prepare(self, device: DeviceContext) -> None:
        """Bring the rows to where the step begins. Raises BadInput, CacheFull, RequestTooLarge;
        the rows are then as they were.
        """
        self.hidden = device.put(self.hidden)
        arrange_rows(self.kv, self.plan)
        self.has_begun = True

    def segments(self, num_tokens: int) -> list[Segment]:
        """See BatchableJob."""
        return [
            Segment(
                hidden=self.hidden[run.offset : run.offset + run.count],
                blocks=self.blocks,
                row=self.kv.rows[run.row],
                start=run.start,
                adapter=self.adapter,
                prompts=self.prompts,
                rope_lengths=self.plan.rope_lengths[run.offset : run.offset + run.count],
            )
            for run in self.plan.pieces(self._num_done, num_tokens)
        ]

    def accept(self, num_tokens: int, outputs: Sequence[Tensor]) -> None:
        """See BatchableJob."""
        self._outputs += outputs
        self._num_done += num_tokens

    def abort(self) -> None:
        """Let the rows end where the step began, so that it can be repeated."""
        if self.has_begun:
            # Every row, also one that seems to end there: a forward that has failed may have
            # written to some of the blocks.
            for row, start in enumerate(self.plan.starts):
                self.kv.truncate(row, start)

    def result(self) -> Tensor:
        """See the class."""
        # torch.cat copies even a single output: a view would keep the outputs of the whole batch in
        # memory for as long as the caller keeps this one.
        joined = torch.cat(self._outputs) if self._outputs else self.hidden
        return narrowed(joined, self.out_dtype).cpu()


def arrange_rows(kv: SessionKV, plan: StepPlan) -> None:
    """Reserve memory for a step, reorder the rows as it says and let each end where it begins.

    Raises CacheFull or RequestTooLarge and changes no row.
    """
    longest = max(plan.lengths_after, default=0)
    if longest > kv.max_length:
        kv.extend(-(-longest // GROWTH_TOKENS) * GROWTH_TOKENS)
    if plan.reorder is not None:
        kv.reorder(plan.reorder)
    for index, (row, start) in enumerate(zip(kv.rows, plan.starts, strict=True)):
        if row.length != start:
            kv.truncate(index, start)
