"""What a session has fed to its first hop, row by row, so that it can be fed again.

The rows are rolled back and reordered like the servers' rows, so that a replay sends only what
still lives. All sessions of a client share a budget; one that would exceed it keeps nothing. Knows
tensors; knows no servers and no steps' fate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petals.errors import RouteError

_MERGED_TOKENS = 256
"""Chunks of so many tokens are long enough."""


@dataclass(frozen=True, slots=True)
class Part:
    """``counts[r]`` tokens of row r from ``starts[r]``; hidden: [sum(counts), H], row after row."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    hidden: Tensor


class KeptInputs:
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

    def branch(self, starts: Sequence[int], reorder: Sequence[int] | None = None) -> "KeptInputs":
        """The rows as a step from ``starts`` finds them, after its ``reorder``; ours stay."""
        sources = range(len(self._rows)) if reorder is None else reorder
        branch = KeptInputs(0)
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

    def whole(self) -> Part | None:
        """Everything from position 0; None if that is nothing. Raises like ``since``."""
        return self.since((0,) * len(self.lengths))

    def since(self, starts: Sequence[int]) -> Part | None:
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
        return Part(tuple(starts), counts, torch.cat(chunks))


def cut(part: Part, limit: int) -> Iterator[Part]:
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
        yield Part(starts, tuple(counts), hidden)


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
