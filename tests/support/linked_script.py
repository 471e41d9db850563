"""What a session on a ring is told, step by step, and what must come out of it."""

from collections.abc import Sequence

import torch

from support.linked_services import RingOfServers, StepForwarder
from support.service import assert_close, states

PARTS = ((10, 11), (11, 13), (13, 14))


class Told:
    """Rows as the client knows them; what is put out must equal the whole model's."""

    def __init__(self, ring: StepForwarder, num_rows: int) -> None:
        self.ring = ring
        self.rows = [states(0) for _ in range(num_rows)]
        self.step_id = -1

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def take(
        self, counts: Sequence[int], starts: Sequence[int], reorder: Sequence[int] | None
    ) -> list[torch.Tensor]:
        """The next step's new states; the rows are moved on."""
        self.step_id += 1
        old = self.rows if reorder is None else [self.rows[row] for row in reorder]
        seeds = range(100 * self.step_id + 1000, 100 * self.step_id + 1100)
        new = [states(count, seed) for count, seed in zip(counts, seeds)]
        self.rows = [torch.cat([row[:at], part]) for row, at, part in zip(old, starts, new)]
        return new

    def check(self, starts: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
        for row, start, output in zip(self.rows, starts, outputs, strict=True):
            if len(output):
                assert_close(output, self.ring.swarm.expected(row)[start:])

    async def step(
        self,
        counts: Sequence[int],
        starts: Sequence[int] | None = None,
        reorder: tuple[int, ...] | None = None,
    ) -> None:
        starts = self.lengths if starts is None else starts
        hidden = self.take(counts, starts, reorder)
        self.check(starts, await self.ring.step(self.step_id, starts, hidden, reorder))


async def ring_for(swarm: RingOfServers, rows: int) -> Told:
    return Told(await swarm.ring(*PARTS, rows=rows), rows)


async def plain(told: Told) -> None:
    await told.step([9, 12])


async def rolled_back(told: Told) -> None:
    await told.step([9, 12])
    await told.step([2, 0], [4, 11])


async def reordered(told: Told) -> None:
    await told.step([9, 12])
    await told.step([1, 2], [9, 5], (0, 0))
    await told.step([1, 0], [7, 3], (1, 0))


async def grown(told: Told) -> None:
    await told.step([9, 12])
    await told.step([1, 1, 1], [9, 12, 12], (0, 1, 1))


async def ragged(told: Told) -> None:
    await told.step([13, 1])
    await told.step([0, 3])


HISTORIES = [plain, rolled_back, reordered, grown, ragged]
