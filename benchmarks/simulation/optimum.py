"""What a placement could reach at best, as far as a search finds it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from petals.server.lifecycle.placement import Rates
from petals.types import BlockSpan
from simulation.scenario import Server

GOOD_ENOUGH = 0.98
"""Of the bound: no search is needed beyond."""


def weakest_window(served: Rates, length: int) -> BlockSpan:
    """Compared by the weakest block, then by the second weakest and so on; the first of equals."""
    windows = np.lib.stride_tricks.sliding_window_view(served, length)
    lowest = windows.min(axis=1)
    tied = np.flatnonzero(lowest == lowest.min())
    start = int(min(tied, key=lambda start: sorted(windows[start].tolist())))
    return BlockSpan(start, start + length)


def best_placement(
    servers: Iterable[Server], num_blocks: int, rounds: int, seed: int = 0
) -> list[Server]:
    """The servers where the weakest block has most by even shares, as far as was found.

    All are placed anew, the largest share first; then, again and again, a few are taken out and put
    back where the weakest blocks are, and whatever is not worse is kept. Half of the rounds start
    over from random orders. Every server holds as many blocks as it can.
    """
    rng = random.Random(seed)
    everybody = sorted(servers, key=lambda s: (-s.throughput / s.capacity, s.peer_id))
    bound = sum(server.throughput for server in everybody) / num_blocks
    best = _Placing(everybody, num_blocks)
    for start in range(4 if rounds else 0):
        placing = _Placing(everybody if not start else _shuffled(everybody, rng), num_blocks)
        for _ in range(rounds // 4):
            if max(best.bottleneck, placing.bottleneck) >= GOOD_ENOUGH * bound:
                break
            placing.try_again(rng)
        best = max(best, placing, key=lambda p: p.bottleneck)
    return best.placed()


def even_shares(servers: Iterable[Server], num_blocks: int) -> float:
    """Passes per second of the weakest block if each server divides its own evenly."""
    served = np.zeros(num_blocks)
    for server in servers:
        served[server.blocks.start : server.blocks.end] += server.throughput / len(server.blocks)
    return float(served.min())


def most_flow(servers: Iterable[Server], num_blocks: int) -> float:
    """Passes per second that every block can have at once, if clients go where queues are short.

    Each server divides its passes among its blocks as it is asked; found to a thousandth by
    bisection. Of the holders of a block the one whose blocks end first is used up first: with
    spans of consecutive blocks that is the best there is.
    """
    by_end = sorted(servers, key=lambda server: server.blocks.end)
    holders: list[list[int]] = [[] for _ in range(num_blocks)]
    for number, server in enumerate(by_end):
        for block in range(server.blocks.start, server.blocks.end):
            holders[block].append(number)
    low, high = 0.0, sum(server.throughput for server in by_end) / num_blocks
    for _ in range(10):
        middle = (low + high) / 2
        left = [server.throughput for server in by_end]
        if all(_use_up(left, found, middle) for found in holders):
            low = middle
        else:
            high = middle
    return low


def _use_up(left: list[float], holders: Sequence[int], wanted: float) -> bool:
    for number in holders:
        used = min(left[number], wanted)
        left[number] -= used
        wanted -= used
        if wanted <= 0:
            return True
    return wanted < 1e-6


def _shuffled(servers: Sequence[Server], rng: random.Random) -> list[Server]:
    """Large ones still come early."""
    return sorted(servers, key=lambda s: -s.throughput / s.capacity * rng.lognormvariate(0.0, 0.5))


class _Placing:
    """Where everybody is put."""

    def __init__(self, servers: Sequence[Server], num_blocks: int) -> None:
        self.served = np.zeros(num_blocks)
        self.spans: dict[int, BlockSpan] = {}
        self.servers = list(servers)
        for number in range(len(self.servers)):
            self._put(number)

    @property
    def bottleneck(self) -> float:
        return float(self.served.min())

    def placed(self) -> list[Server]:
        return [replace(server, blocks=self.spans[i]) for i, server in enumerate(self.servers)]

    def try_again(self, rng: random.Random) -> None:
        """Take up to five out and put them back; undone if that makes it worse."""
        before, spans, served = self.bottleneck, dict(self.spans), self.served.copy()
        some = rng.sample(range(len(self.servers)), min(len(self.servers), rng.randint(1, 5)))
        for number in some:
            self._add(number, self.spans.pop(number), -1)
        for number in some:
            self._put(number)
        if self.bottleneck < before:
            self.spans, self.served = spans, served

    def _put(self, number: int) -> None:
        span = weakest_window(self.served, self.servers[number].capacity)
        self.spans[number] = span
        self._add(number, span, 1)

    def _add(self, number: int, span: BlockSpan, sign: int) -> None:
        share = self.servers[number].throughput / len(span)
        self.served[span.start : span.end] += sign * share
