"""A session through several servers that forward to each other, driven frame by frame, and what
must come out of it.
"""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch

from petals.server.config import ClientLimits
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan
from petals.wire.header import NextHop
from petals.wire.replies import ReplayDone, StepResult
from petals.wire.requests import BeginEpoch, ReplayRequest, Step
from support.reference import assert_close, states
from support.service import Served, Worker, served
from support.talk import Talk

Blocks = tuple[int, int]
PARTS = ((10, 11), (11, 13), (13, 14))


@dataclass
class Leg(Talk):
    """A reservation at one hop, as the client sees it."""

    worker: Worker = field(kw_only=True)

    @property
    def part(self) -> Blocks:
        return self.blocks.start, self.blocks.end


@dataclass
class LinkedSession:
    """One session of a client through ``legs``, and the rows as the client knows them."""

    swarm: Served
    client: SwarmNode
    epoch: int = 0
    legs: list[Leg] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    step_id: int = -1
    _replay_ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(10_000))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    @property
    def num_batches(self) -> list[int]:
        return [leg.worker.num_batches for leg in self.legs]

    async def add(self, worker: Worker, blocks: Blocks, rows: int = 1) -> Leg:
        """Open a hop behind those there are; its source is the one before it."""
        sources = (self.legs[-1].worker.peer_id,) if self.legs else ()
        leg = await self.open(worker, blocks, rows, sources)
        self.legs.append(leg)
        return leg

    async def open(
        self, worker: Worker, blocks: Blocks, rows: int = 1, sources: tuple[str, ...] = ()
    ) -> Leg:
        talk = await self.swarm.talk(self.client, worker)
        span = BlockSpan(*blocks)
        leg = Leg(talk.channel, span, talk.session_id, self.epoch, worker=worker)
        await leg.open(rows, sources=sources)
        return leg

    def next_hops(self, first: int = 0) -> tuple[NextHop, ...]:
        """The hops behind leg ``first``."""
        return tuple(leg.next_hop for leg in self.legs[first + 1 :])

    def message(
        self,
        step_id: int,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: tuple[int, ...] | None = None,
        first: int = 0,
    ) -> Step:
        """A step for leg ``first`` that goes on through all legs behind it."""
        leg = self.legs[first]
        return leg.message(step_id, starts, counts, reorder, self.next_hops(first))

    async def send(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> None:
        message = self.message(step_id, starts, [len(part) for part in hidden], reorder)
        await self.legs[0].channel.send(message, (torch.cat(list(hidden)),))

    async def result(self, step_id: int) -> torch.Tensor:
        """What the last hop has put out."""
        leg = self.legs[-1]
        answer, tensors = await leg.hear()
        assert isinstance(answer, StepResult), answer
        assert (answer.header, answer.undelivered) == (leg.header(step_id), ())
        assert len(answer.timings) == len(self.legs) - 1
        return tensors[0]

    async def ask(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """One step through all legs; hidden[r]: [n_r, H] -> the same shapes."""
        await self.send(step_id, starts, hidden, reorder)
        return list((await self.result(step_id)).split([len(part) for part in hidden]))

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
        """Outputs equal those of the whole model."""
        for row, start, output in zip(self.rows, starts, outputs, strict=True):
            if len(output):
                assert_close(output, self.swarm.expected(row)[start:])

    async def step(
        self,
        counts: Sequence[int],
        starts: Sequence[int] | None = None,
        reorder: tuple[int, ...] | None = None,
    ) -> None:
        """The next step of the rows; its outputs are right."""
        starts = self.lengths if starts is None else starts
        hidden = self.take(counts, starts, reorder)
        self.check(starts, await self.ask(self.step_id, starts, hidden, reorder))

    async def begin_epoch(self, *legs: Leg, newer: bool = True) -> None:
        """A new epoch begins: ``legs`` (all) learn who comes before them now."""
        self.epoch += newer
        for leg in self.legs:
            leg.epoch = self.epoch
        for leg in legs or self.legs:
            index = self.legs.index(leg)
            sources = (self.legs[index - 1].worker.peer_id,) if index else ()
            await leg.channel.send(BeginEpoch(leg.header(), sources))

    async def replace(self, failed: slice, workers: Sequence[Worker], rows: int = 1) -> list[Leg]:
        """The legs ``failed`` die; ``workers`` get their blocks, one each; a new epoch begins."""
        self.epoch += 1
        lost = self.legs[failed]
        for leg in lost:
            self.swarm.net.kill(leg.worker.peer_id)
        start, end = lost[0].blocks.start, lost[-1].blocks.end
        cuts = [start, *range(start + 1, start + len(workers)), end]
        sources = (self.legs[failed.start - 1].worker.peer_id,)
        new = []
        for worker, blocks in zip(workers, zip(cuts, cuts[1:])):
            new.append(await self.open(worker, blocks, rows, sources))
            sources = (worker.peer_id,)
        self.legs[failed] = new
        await self.begin_epoch(*[leg for leg in self.legs if leg not in new], newer=False)
        return new

    def replay(
        self,
        donor: Leg,
        targets: Sequence[Leg],
        before_step: int,
        lengths: Sequence[int] | None = None,
        **changes: object,
    ) -> ReplayRequest:
        """A request for ``donor`` to fill ``targets`` with what it has put out."""
        lengths = self.lengths if lengths is None else lengths
        hops = tuple(leg.next_hop for leg in targets)
        header = donor.header(next(self._replay_ids))
        return ReplayRequest(header, before_step, tuple(lengths), hops, **changes)

    async def fill(
        self,
        donor: Leg,
        targets: Sequence[Leg],
        before_step: int,
        lengths: Sequence[int] | None = None,
        **changes: object,
    ) -> None:
        """``replay``, until the last of ``targets`` is filled."""
        request = self.replay(donor, targets, before_step, lengths, **changes)
        await donor.channel.send(request)
        await self.filled(targets[-1], request)

    async def filled(self, last: Leg, request: ReplayRequest) -> None:
        answer, _ = await last.hear()
        assert answer == ReplayDone(last.header(request.header.request_id)), answer

    async def refill(
        self,
        new: Sequence[Leg],
        before_step: int,
        lengths: Sequence[int] | None = None,
        reorder: tuple[int, ...] | None = None,
    ) -> None:
        """Fill new legs from the leg before them."""
        donor = self.legs[self.legs.index(new[0]) - 1]
        await self.fill(donor, new, before_step, lengths, reorder=reorder)


async def linked(
    swarm: Served, *blocks: Blocks, rows: int = 1, client: SwarmNode | None = None
) -> LinkedSession:
    """A session through the first servers, one for every range."""
    session = LinkedSession(swarm, client or swarm.client, rows=[states(0)] * rows)
    for worker, part in zip(swarm.workers, blocks):
        await session.add(worker, part, rows)
    return session


@asynccontextmanager
async def linked_servers(
    num_servers: int = 3, model: str = "llama", **options: object
) -> AsyncIterator[Served]:
    """Servers that cut replays into short parts."""
    door = ClientLimits(replay_chunk_tokens=5)
    async with served(model, num_servers=num_servers, door=door, **options) as swarm:
        yield swarm


async def plain(session: LinkedSession) -> None:
    await session.step([9, 12])


async def rolled_back(session: LinkedSession) -> None:
    await session.step([9, 12])
    await session.step([2, 0], [4, 11])


async def reordered(session: LinkedSession) -> None:
    await session.step([9, 12])
    await session.step([1, 2], [9, 5], (0, 0))
    await session.step([1, 0], [7, 3], (1, 0))


async def grown(session: LinkedSession) -> None:
    await session.step([9, 12])
    await session.step([1, 1, 1], [9, 12, 12], (0, 1, 1))


async def ragged(session: LinkedSession) -> None:
    await session.step([13, 1])
    await session.step([0, 3])


HISTORIES = [plain, rolled_back, reordered, grown, ragged]
