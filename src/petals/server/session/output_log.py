"""What a session has put out since position 0, so that a successor can be fed again.

Rows are cut, forked and reordered like the KV rows they stand beside. All outboxes of a server
share a budget of host memory: when it is spent, the oldest session's outbox is dropped as a whole.
Knows tensors and rows; knows no peers, no messages and no steps' fate.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from petals.errors import OutboxLost
from petals.server.compute.step_plan import TokenRun

_MERGED_TOKENS = 128
"""Chunks of so many tokens are long enough."""
_MERGED_CHUNKS = 16
"""So many chunks of which the first is short become one."""


class OutputLogBudget:
    """The budget that all outboxes of a server share, in the order in which they were opened."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[OutputLog, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all rows; forks count as if they shared nothing."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self._used_bytes

    def open(self, num_rows: int) -> "OutputLog":
        """An outbox of ``num_rows`` empty rows."""
        return OutputLog(self, num_rows)

    def _book(self, outbox: "OutputLog", num_bytes: int) -> None:
        """``outbox`` now holds ``num_bytes``; the oldest ones make room for it, or it goes."""
        self._used_bytes += num_bytes - self._held.get(outbox, 0)
        self._held[outbox] = num_bytes
        while self._used_bytes > self.budget_bytes:
            next(held for held, size in self._held.items() if size).drop()

    def _forget(self, outbox: "OutputLog") -> None:
        self._used_bytes -= self._held.pop(outbox, 0)


class OutputLog:
    """The rows of one session: lists of chunks [n, H] that nobody changes any more."""

    def __init__(self, outboxes: OutputLogBudget, num_rows: int) -> None:
        self._outboxes = outboxes
        self._rows: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._lengths = [0] * num_rows
        self._token_bytes = 0
        self.is_lost = False
        self._book()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in every row; nothing once it is lost."""
        return tuple(self._lengths)

    def cut(self, starts: Sequence[int], reorder: Sequence[int] | None = None) -> None:
        """Let new row r continue old row ``reorder[r]`` and end at ``starts[r]``.

        What is lost comes to life again where every row begins anew.
        """
        if not any(starts):
            self._rows, self.is_lost = [[] for _ in starts], False
        elif self.is_lost or (reorder is None and list(starts) == self._lengths):
            return
        else:
            sources = range(len(self._rows)) if reorder is None else reorder
            self._rows = [_cut(self._rows[row], start) for row, start in zip(sources, starts)]
        self._lengths = list(starts)
        self._book()

    def append(self, counts: Sequence[int], hidden: Tensor) -> None:
        """Add ``counts[r]`` tokens to row r. hidden: [sum(counts), H], not changed afterwards."""
        num_tokens = sum(counts)
        if self.is_lost or not num_tokens:
            return
        parts = hidden.split(list(counts)) if len(counts) > 1 else (hidden,)
        for index, (count, part) in enumerate(zip(counts, parts)):
            if count:
                # A part of its own storage: it must not keep the neighbours' memory alive.
                self._rows[index].append(part if count == num_tokens else part.clone())
                self._lengths[index] += count
                _merge_end(self._rows[index])
        self._token_bytes = hidden.nbytes // num_tokens
        self._book()

    def rows(self) -> "OutboxRows":
        """The rows as they are now, whatever happens to them later. Raises OutboxLost."""
        if self.is_lost:
            raise OutboxLost(
                "The session's outputs were dropped to make room for others'.",
                hint="Feed the session's own inputs through a new route.",
            )
        return OutboxRows([tuple(row) for row in self._rows])

    def drop(self) -> None:
        """Give the memory back. Idempotent."""
        self._rows, self._lengths, self.is_lost = [], [], True
        self._outboxes._forget(self)

    def _book(self) -> None:
        if not self.is_lost:
            self._outboxes._book(self, sum(self._lengths) * self._token_bytes)


class OutboxRows:
    """A snapshot of rows."""

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        self._rows = rows
        self.lengths = tuple(sum(map(len, row)) for row in rows)

    def read(self, pieces: Iterable[TokenRun]) -> Iterator[Tensor]:
        """The tokens of ``pieces``, one after the other, as chunks [n, H]."""
        for piece in pieces:
            position = 0
            for chunk in self._rows[piece.row]:
                low = max(piece.start, position)
                high = min(piece.start + piece.count, position + len(chunk))
                if low < high:
                    yield chunk[low - position : high - position]
                position += len(chunk)


def _merge_end(row: list[Tensor]) -> None:
    """Keep rows that grow token by token in few chunks, at the price of some copying."""
    if len(row) >= _MERGED_CHUNKS and len(row[-_MERGED_CHUNKS]) < _MERGED_TOKENS:
        row[-_MERGED_CHUNKS:] = [torch.cat(row[-_MERGED_CHUNKS:])]


def _cut(row: Sequence[Tensor], length: int) -> list[Tensor]:
    kept, position = [], 0
    for chunk in row:
        if position + len(chunk) > length:
            if position < length:
                kept.append(chunk[: length - position].clone())
            break
        kept.append(chunk)
        position += len(chunk)
    return kept
