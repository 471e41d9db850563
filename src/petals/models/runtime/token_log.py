"""Hidden states of a session's rows, kept so that a lost server can be filled again from them.

A client keeps what it has sent to the first hop, a server keeps what it has put out. The rows are
cut, reordered and extended together with the rows of keys and values that they belong to. With
every token its rope length is kept (``rope_lengths``), so that a replay gives the same keys. All
logs of one owner share a memory budget. Knows tensors; knows no peers, no messages and no steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petals.errors import OutboxLost
from petals.models.runtime.rope_lengths import whole_forward

_MERGED_TOKENS = 128
"""Chunks of at least this many tokens are not merged any more."""

_MERGED_CHUNKS = 16
"""Number of chunks at a row's end that become one chunk, if the first of them is short. Every token
is copied at most about ``_MERGED_TOKENS / _MERGED_CHUNKS`` times.
"""

PerRowCounts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowSlices:
    """``counts[r]`` tokens of row r from ``starts[r]``; hidden: [sum(counts), H], row after row.

    rope_lengths: the rope length of each of these tokens, in the same order.
    """

    starts: PerRowCounts
    counts: PerRowCounts
    hidden: Tensor
    rope_lengths: tuple[int, ...]

    @classmethod
    def whole_forward(
        cls, starts: Sequence[int], counts: Sequence[int], hidden: Tensor
    ) -> "RowSlices":
        """Tokens that run in one forward, as the model itself would run them."""
        return cls(tuple(starts), tuple(counts), hidden, whole_forward(starts, counts))

    def parts(self, max_tokens: int) -> Iterator["RowSlices"]:
        """Successive parts of at most ``max_tokens`` tokens in packed order (0: no limit)."""
        done = 0
        for starts, counts in split_counts(self.starts, self.counts, max_tokens):
            end = done + sum(counts)
            yield RowSlices(starts, counts, self.hidden[done:end], self.rope_lengths[done:end])
            done = end


def split_counts(
    starts: Sequence[int], counts: Sequence[int], max_tokens: int
) -> Iterator[tuple[PerRowCounts, PerRowCounts]]:
    """(starts, counts) of successive parts of at most ``max_tokens`` tokens in packed order.

    0: no limit. At least one part, which is empty if there are no tokens.
    """
    total = sum(counts)
    step = max_tokens or max(total, 1)
    for first in range(0, max(total, 1), step):
        begun, taken, passed = [], [], 0
        for start, count in zip(starts, counts):
            low = min(max(first - passed, 0), count)
            high = min(max(first + step - passed, 0), count)
            begun.append(start + low)
            taken.append(high - low)
            passed += count
        yield tuple(begun), tuple(taken)


class LogBudget:
    """Memory (bytes) that all logs of one owner may use together.

    When it is exceeded, the oldest log that holds anything is dropped as a whole.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        """Bytes of all rows; rows that share chunks are counted as if they did not."""
        self._logs: dict[TokenLog, int] = {}

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - self.used_bytes

    def open(self, num_rows: int) -> "TokenLog":
        """A log of ``num_rows`` empty rows within this budget. ``drop`` it when it ends."""
        log = TokenLog(num_rows, self)
        self.book(log, 0)
        return log

    def book(self, log: "TokenLog", num_bytes: int) -> None:
        """``log`` holds ``num_bytes`` now. May drop logs, also this one."""
        self.used_bytes += num_bytes - self._logs.get(log, 0)
        self._logs[log] = num_bytes
        while self.used_bytes > self.max_bytes:
            next(held for held, size in self._logs.items() if size).drop()

    def forget(self, log: "TokenLog") -> None:
        """``log`` holds nothing any more. Idempotent."""
        self.used_bytes -= self._logs.pop(log, 0)


@dataclass(frozen=True, slots=True, eq=False)
class LoggedTokens:
    """Consecutive tokens of a row: hidden [n, H] and rope lengths [n] (int32)."""

    hidden: Tensor
    rope_lengths: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, start: int, end: int) -> "LoggedTokens":
        """Tokens [start, end), which share this memory."""
        return LoggedTokens(self.hidden[start:end], self.rope_lengths[start:end])

    def clone(self) -> "LoggedTokens":
        """The same in memory of its own."""
        return LoggedTokens(self.hidden.clone(), self.rope_lengths.clone())


class TokenLog:
    """Rows of hidden states; a row is a list of chunks that are never changed in place.

    is_dropped: only the lengths are known, until every row begins anew. Without a budget the log
    counts nowhere (a branch, which lives as long as a step or a replay).
    """

    def __init__(self, num_rows: int, budget: LogBudget | None = None) -> None:
        self.lengths: PerRowCounts = (0,) * num_rows
        self.is_dropped = False
        self._rows: list[list[LoggedTokens]] = [[] for _ in range(num_rows)]
        self._token_bytes = 0
        self._budget = budget

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows; rows that share chunks are counted as if they did not."""
        return 0 if self.is_dropped else sum(self.lengths) * self._token_bytes

    def branch(
        self, starts: Sequence[int] | None = None, reorder: Sequence[int] | None = None
    ) -> "TokenLog":
        """The rows as they are now, then ``cut`` (None: not cut); this log stays as it is."""
        branch = TokenLog(0)
        branch._copy(self)
        if starts is not None:
            branch.cut(starts, reorder)
        return branch

    def take(self, branch: "TokenLog") -> None:
        """Become equal to a ``branch`` that has gone ahead."""
        self._copy(branch)
        self._book()

    def cut(self, starts: Sequence[int], reorder: Sequence[int] | None = None) -> None:
        """Let new row r continue old row ``reorder[r]``, and end it at ``starts[r]``."""
        if not any(starts):
            self._rows, self.is_dropped = [[] for _ in starts], False
        elif not self.is_dropped:
            order = range(len(self._rows)) if reorder is None else reorder
            self._rows = [
                list(self._rows[row])
                if start == self.lengths[row]
                else _shortened(self._rows[row], start)
                for row, start in zip(order, starts)
            ]
        self.lengths = tuple(starts)
        self._book()

    def append(self, counts: Sequence[int], hidden: Tensor, rope_lengths: Sequence[int]) -> None:
        """Add ``counts[r]`` tokens to row r. hidden: [sum(counts), H], not changed afterwards;
        ``rope_lengths``: one for each of them.
        """
        num_tokens = sum(counts)
        if not num_tokens:
            return
        self.lengths = tuple(length + count for length, count in zip(self.lengths, counts))
        if self.is_dropped:
            return
        new, first = LoggedTokens(hidden, torch.tensor(rope_lengths, dtype=torch.int32)), 0
        for row, count in zip(self._rows, counts):
            if count:
                # A part gets storage of its own: a view would keep the other rows' memory alive.
                part = new if count == num_tokens else new.part(first, first + count).clone()
                row.append(part)
                _merge_end(row)
            first += count
        self._token_bytes = hidden.nbytes // num_tokens
        self._book()

    def whole(self) -> RowSlices | None:
        """Everything from position 0; None if the rows are empty. Raises OutboxLost."""
        return self.since((0,) * len(self.lengths))

    def since(self, starts: Sequence[int]) -> RowSlices | None:
        """Every row from its start to its end; None if that is nothing. Raises OutboxLost."""
        counts = tuple(length - start for length, start in zip(self.lengths, starts))
        chunks = list(self.read(starts, counts))
        if not chunks:
            return None
        whole = _joined(chunks)
        return RowSlices(tuple(starts), counts, whole.hidden, tuple(whole.rope_lengths.tolist()))

    def read(self, starts: Sequence[int], counts: Sequence[int]) -> Iterator[LoggedTokens]:
        """``counts[r]`` tokens of row r from ``starts[r]``, row after row, in chunks.

        Raises OutboxLost if the rows were dropped.
        """
        if self.is_dropped and any(counts):
            raise OutboxLost("The rows were dropped to stay within the memory budget.")
        for row, start, count in zip(self._rows, starts, counts):
            position, end = 0, start + count
            for chunk in row:
                low, high = max(start, position), min(end, position + len(chunk))
                if low < high:
                    yield chunk.part(low - position, high - position)
                position += len(chunk)

    def drop(self) -> None:
        """Free the memory and keep the lengths alone. Idempotent."""
        self._rows, self.is_dropped = [[] for _ in self._rows], True
        if self._budget is not None:
            self._budget.forget(self)

    def _copy(self, other: "TokenLog") -> None:
        self._rows = [list(row) for row in other._rows]
        self.lengths, self.is_dropped = other.lengths, other.is_dropped
        self._token_bytes = other._token_bytes

    def _book(self) -> None:
        if self._budget is not None and not self.is_dropped:
            self._budget.book(self, self.num_bytes)


def _joined(chunks: Sequence[LoggedTokens]) -> LoggedTokens:
    return LoggedTokens(
        torch.cat([chunk.hidden for chunk in chunks]),
        torch.cat([chunk.rope_lengths for chunk in chunks]),
    )


def _merge_end(row: list[LoggedTokens]) -> None:
    if len(row) >= _MERGED_CHUNKS and len(row[-_MERGED_CHUNKS]) < _MERGED_TOKENS:
        row[-_MERGED_CHUNKS:] = [_joined(row[-_MERGED_CHUNKS:])]


def _shortened(row: Sequence[LoggedTokens], length: int) -> list[LoggedTokens]:
    kept, position = [], 0
    for chunk in row:
        if position + len(chunk) > length:
            if position < length:
                # A copy: a view would keep the memory of the tokens that are cut off.
                kept.append(chunk.part(0, length - position).clone())
            break
        kept.append(chunk)
        position += len(chunk)
    return kept
