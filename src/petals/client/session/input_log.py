"""What a session has fed to its first hop, row by row, so that it can be fed again.

The rows are rolled back and reordered like the servers' rows, so that a replay sends only what
still lives. All sessions of a client share a budget; one that would exceed it keeps nothing. Knows
tensors; knows no servers and no steps' fate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from petals.client.connection.tensor_checks import is_finite
from petals.errors import RouteError
from petals.wire.requests import Step

_MERGED_TOKENS = 256
"""Chunks of so many tokens are long enough."""


@dataclass(frozen=True, slots=True)
class RowSlices:
    """``counts[r]`` tokens of row r from ``starts[r]``; hidden: [sum(counts), H], row after row."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    hidden: Tensor


class InputLog:
    """Rows of hidden states; a row is a list of chunks [n, H] that nobody changes any more.

    ``is_dropped``: only the lengths are known, until every row begins anew.
    """

    def __init__(self, num_rows: int) -> None:
        self._rows: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self.lengths: tuple[int, ...] = (0,) * num_rows
        self.is_dropped = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows; those that share chunks are counted as if they did not."""
        return sum(chunk.nbytes for row in self._rows for chunk in row)

    def drop(self) -> None:
        """Keep the lengths alone. Idempotent."""
        self._rows, self.is_dropped = [[] for _ in self._rows], True

    def branch(self, starts: Sequence[int], reorder: Sequence[int] | None = None) -> "InputLog":
        """The rows as a step from ``starts`` finds them, after its ``reorder``; ours stay."""
        sources = range(len(self._rows)) if reorder is None else reorder
        branch = InputLog(0)
        branch._rows = [
            list(self._rows[row])
            if start == self.lengths[row] or self.is_dropped
            else _cut_row(self._rows[row], start)
            for row, start in zip(sources, starts)
        ]
        branch.lengths = tuple(starts)
        branch.is_dropped = self.is_dropped and any(starts)
        return branch

    def append(self, counts: Sequence[int], hidden: Tensor) -> None:
        """Add tokens to the rows' ends. hidden: [sum(counts), H]; not to be changed afterwards."""
        self.lengths = tuple(length + count for length, count in zip(self.lengths, counts))
        if self.is_dropped:
            return
        for row, chunk in zip(self._rows, torch.split(hidden, list(counts))):
            if len(chunk):
                row.append(chunk)
                # Rows that grow token by token stay in few chunks, at the price of some copying.
                while len(row) > 1 and len(row[-2]) <= len(row[-1]) < _MERGED_TOKENS:
                    row[-2:] = [torch.cat(row[-2:])]

    def whole(self) -> RowSlices | None:
        """Everything from position 0; None if that is nothing. Raises like ``since``."""
        return self.since((0,) * len(self.lengths))

    def since(self, starts: Sequence[int]) -> RowSlices | None:
        """What every row has from its start on; None if that is nothing.

        Raises RouteError if the rows were dropped.
        """
        if self.is_dropped:
            raise RouteError(
                "The session cannot be fed again: its inputs would not fit into max_kept_bytes.",
                hint="Begin a new session with what was generated; raise max_kept_bytes next time.",
            )
        chunks = [chunk for row, start in zip(self._rows, starts) for chunk in _tail(row, start)]
        if not chunks:
            return None
        counts = tuple(length - start for length, start in zip(self.lengths, starts))
        return RowSlices(tuple(starts), counts, torch.cat(chunks))


def cut(part: RowSlices, limit: int) -> Iterator[RowSlices]:
    """``part`` in successive parts of at most ``limit`` tokens, in packed order (0: no limit)."""
    total = part.hidden.shape[0]
    if not limit or total <= limit:
        yield part
        return
    done = [0] * len(part.counts)
    for hidden in torch.split(part.hidden, limit):
        room = hidden.shape[0]
        starts = tuple(start + have for start, have in zip(part.starts, done))
        counts = []
        for row, count in enumerate(part.counts):
            counts.append(min(room, count - done[row]))
            room -= counts[row]
            done[row] += counts[row]
        yield RowSlices(starts, tuple(counts), hidden)


def _tail(row: list[Tensor], start: int) -> Iterator[Tensor]:
    for chunk in row:
        if start < len(chunk):
            yield chunk[start:]
        start = max(0, start - len(chunk))


def _cut_row(row: list[Tensor], length: int) -> list[Tensor]:
    kept, have = [], 0
    for chunk in row:
        if have + len(chunk) > length:
            if have < length:
                kept.append(chunk[: length - have])
            break
        kept.append(chunk)
        have += len(chunk)
    return kept


class ReplayMismatch(ValueError):
    """What came cannot be what was asked for; the text says why."""


@dataclass(slots=True)
class ReplayBuffer:
    """At most ``max_tokens`` of width ``hidden_size``, from ``starts`` on (empty: from position 0).

    ``reordered``: the rows stand as the reorder of the step to follow leaves them.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    starts: tuple[int, ...] = ()
    rows: InputLog = field(default_factory=lambda: InputLog(0))
    reordered: bool = False

    def add(self, step: Step, tensors: Sequence[Tensor]) -> None:
        """The next tokens of every row, as they would have gone to the next hop. Raises
        WrongRows.
        """
        if not self.rows.lengths:
            self.rows = InputLog(len(step.counts))
        num_tokens = sum(step.counts)
        starts = self.starts or (0,) * len(self.rows.lengths)
        due = tuple(start + come for start, come in zip(starts, self.rows.lengths))
        if step.starts != due or len(step.counts) != len(due):
            raise ReplayMismatch("rows that do not follow each other")
        if sum(self.rows.lengths) + num_tokens > self.max_tokens:
            raise ReplayMismatch("more rows than were asked for")
        shape = [tensor.shape for tensor in tensors]
        if shape != [(num_tokens, self.hidden_size)] or tensors[0].dtype != self.dtype:
            raise ReplayMismatch("rows of another shape")
        if not is_finite(tensors[0]):
            raise ReplayMismatch("NaN or infinity")
        self.rows.append(step.counts, tensors[0])
        self.reordered = step.reordered

    def part(self) -> RowSlices | None:
        """What has come; None for nothing."""
        whole = self.rows.whole()
        return replace(whole, starts=self.starts) if whole is not None and self.starts else whole
