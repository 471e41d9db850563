"""The plan of a session's step: checked against the lengths of the session's rows, and cut into
runs of tokens that fit a batch.

Plain values and arithmetic: no torch, no network, no clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from petals.errors import BadInput, BatchTooLarge, LengthExceeded, SessionGap

MAX_DECODE_TOKENS_PER_ROW = 16
"""Most new tokens in a row of a decode step: one token, or a speculation to be verified."""

MAX_DECODE_TOKENS = 128
"""Most new tokens of a decode step, all rows together. A larger step is a prefill."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One checked step: row r runs ``counts[r]`` tokens from position ``starts[r]``.

    ``reorder[r]`` is the old row that new row r continues; None leaves the rows as they are.
    Packed, the tokens of the step are those of row 0, then those of row 1, and so on.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    reorder: tuple[int, ...] | None = None

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
) -> StepPlan:
    """Check a step against the present ``lengths`` of its session's rows.

    Raises BadInput (starts, counts and reorder that contradict each other), BatchTooLarge (rows or
    tokens), SessionGap (a row would start behind its end) or LengthExceeded.
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
    plan = StepPlan(starts, counts, reorder)
    _check_size(plan, limits)
    return plan


def _check_size(plan: StepPlan, limits: StepLimits) -> None:
    longest = max(plan.lengths_after, default=0)
    if longest > limits.max_length:
        raise LengthExceeded(
            f"A row would grow to {longest} tokens; the session takes {limits.max_length}.",
            hint="Open the session with a larger max_length.",
        )
    if plan.num_tokens > limits.max_step_tokens:
        raise BatchTooLarge(
            f"{plan.num_tokens} tokens in one step, the limit is {limits.max_step_tokens}.",
            hint="Send the tokens in several steps.",
        )
