"""Which blocks a server should hold: those by which the weakest blocks of the swarm gain most.

One summary of the swarm (``Coverage``) answers two questions: which blocks should a new server
take, and which server would help most by moving? Values in, values out: no clock, no random
numbers, no network; ``rebalancing`` adds when each server decides.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np
import numpy.typing as npt

from petals.errors import ConfigError
from petals.swarm.directory.records import BlockRange, ServerRecord, View
from petals.types import BlockSpan, PeerId, ServerState

UNMEASURED_THROUGHPUT = 1.0
"""Block passes per second assumed of a server while no server has announced a measurement."""

STRONGEST_DISCOUNT = 0.9
"""Share of a block's strongest server that does not count as dependable: that server may be the
next to fail. So a block with one fast server ranks below one with two servers of half its speed.
"""

STEEPNESS = 8
"""need = (dependable / level) ** -STEEPNESS: half the dependable throughput is 2**8 times the need.
"""

SHIFTING_ROUNDS = 16
"""Rounds of ``carried_by``; swarms of 30 and 100 servers are then within a few per cent of the best
division of passes.
"""

LEAST_DEPENDABLE = 1 / 1024
"""Dependable throughput, as a share of the level, below which blocks count as equally weak. In a
large swarm a first server adds less than this, so blocks without any get GAP_FACTOR besides.
"""

GAP_FACTOR = 16.0
"""Factor of the need of blocks without a server."""

OTHERS_LEFT = 2
"""Servers that must be online at a block that a server leaves: a single one may fail next."""

MOST_COMPARED = 256
"""Most servers whose best moves are computed; a larger swarm is sampled."""

Rates = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Coverage:
    """The throughput (tokens/s) of every block of a model; arrays of one entry per block.

    served: sum of the shares of the servers that are online, joining or moving there; the share of
    a server is its throughput / number of its blocks. strongest, second: the largest two shares.
    num_online: servers that are online. servers: all servers that were counted.
    """

    served: Rates
    strongest: Rates
    second: Rates
    num_online: Counts
    servers: tuple[ServerRecord, ...]
    typical_throughput: float

    @cached_property
    def dependable(self) -> Rates:
        """Dependable throughput: served - STRONGEST_DISCOUNT * strongest."""
        return self.served - STRONGEST_DISCOUNT * self.strongest

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.served)

    @property
    def level(self) -> float:
        """Throughput of every block if all shares were distributed evenly: the mean of served."""
        return float(self.served.mean()) if len(self.served) else 0.0

    @cached_property
    def mean_need(self) -> float:
        """Mean need of all blocks, which a join or a move should lower."""
        return float(need(self.dependable, self.level).mean()) if self.level else np.inf

    @cached_property
    def carried(self) -> float:
        """See ``carried_by``."""
        servers = [(blocks_held(r), self.throughput_of(r)) for r in self.servers]
        return carried_by(servers, self.num_blocks)

    def carried_if(self, moved: ServerRecord, blocks: BlockSpan) -> float:
        """``carried`` if the server ``moved`` held ``blocks`` instead of its own."""
        there = ((blocks.start, blocks.end),)
        servers = [
            (there if r is moved else blocks_held(r), self.throughput_of(r)) for r in self.servers
        ]
        return carried_by(servers, self.num_blocks)

    @cached_property
    def best_moves(self) -> "BestMoves":
        """The best move of each server, or of every n-th in swarms larger than MOST_COMPARED."""
        return best_moves_of(self, self.servers[:: 1 + len(self.servers) // MOST_COMPARED])

    def throughput_of(self, record: ServerRecord) -> float:
        """Block passes per second of a server; the median of the others if it announces none."""
        return record.throughput or self.typical_throughput


def need(dependable: Rates, level: float) -> Rates:
    """How much each block needs another server: 1 at the level, rising steeply below it."""
    needs = (np.maximum(dependable, LEAST_DEPENDABLE * level) / level) ** -STEEPNESS
    return np.asarray(np.where(dependable > 1e-9 * level, needs, needs * GAP_FACTOR))


def bottleneck_of(needs: Rates) -> float:
    """The need of all blocks as a share of the level: a soft minimum of dependable / level."""
    return float(needs.mean() ** (-1 / STEEPNESS))


def blocks_held(record: ServerRecord) -> tuple[BlockRange, ...]:
    """The spans that a server serves, or will serve soon; empty if it leaves or has left."""
    if record.state in (ServerState.ONLINE, ServerState.JOINING):
        return record.spans
    return record.next_spans if record.state is ServerState.DRAINING else ()


def length_of(spans: Iterable[BlockRange]) -> int:
    """Number of blocks of all spans."""
    return sum(end - start for start, end in spans)


def coverage_of(view: View, without: Iterable[PeerId] = ()) -> Coverage:
    """The coverage of a view, without some servers. 10,000 records take about 50 ms."""
    ignored = frozenset(without)
    counted = tuple(
        record
        for peer_id, record in view.records.items()
        if blocks_held(record) and peer_id not in ignored
    )
    typical = median([r.throughput for r in counted if r.throughput] or [UNMEASURED_THROUGHPUT])
    spans = [
        (start, end, (r.throughput or typical) / length_of(held), r.state is ServerState.ONLINE)
        for r in counted
        for held in (blocks_held(r),)
        for start, end in held
    ]
    table = np.array(spans, dtype=np.float64).reshape(-1, 4)
    starts, ends, shares, online = table.T
    by_share = np.argsort(-shares, kind="stable")
    starts, ends, shares, online = (c[by_share] for c in (starts, ends, shares, online))
    columns = np.zeros((4, view.num_blocks))
    for block in range(view.num_blocks):
        holding = np.flatnonzero((starts <= block) & (block < ends))
        largest = shares[holding[:2]]
        columns[0, block] = shares[holding].sum()
        columns[1 : 1 + len(largest), block] = largest
        columns[3, block] = online[holding].sum()
    served, strongest, second, num_online = columns
    return Coverage(served, strongest, second, num_online.astype(np.int64), counted, float(typical))


def carried_by(servers: Iterable[tuple[tuple[BlockRange, ...], float]], num_blocks: int) -> float:
    """Share of the level, 0 to 1, that the weakest blocks get from clients that avoid queues.

    servers: spans, and block passes per second, of each. Clients choose the servers with the
    shortest queues, so a server works most for those of its blocks that have the least throughput.
    This is computed by rounds that shift passes, from even shares, towards these blocks. The result
    is a soft minimum: many weak blocks count for more than one.
    """
    alike: dict[tuple[BlockRange, ...], float] = defaultdict(float)
    for spans, throughput in servers:
        alike[spans] += throughput
    throughputs = np.array(list(alike.values()))
    held = _held(list(alike), num_blocks)
    shares = held * (throughputs / np.maximum(held.sum(axis=1), 1))[:, None]
    for _ in range(SHIFTING_ROUNDS):
        wanted = shares / np.maximum(shares.sum(axis=0), 1e-9)
        shares = wanted * (throughputs / np.maximum(wanted.sum(axis=1), 1e-30))[:, None]
    served = shares.sum(axis=0)
    return bottleneck_of(need(served, float(served.mean()))) if served.any() else 0.0


def _held(spans: Sequence[tuple[BlockRange, ...]], num_blocks: int) -> npt.NDArray[np.bool_]:
    """Whether server (row) holds block (column)."""
    held = np.zeros((len(spans), num_blocks), dtype=bool)
    for row, blocks in zip(held, spans):
        for start, end in blocks:
            row[start:end] = True
    return held


def choose_blocks(coverage: Coverage, num_blocks: int, throughput: float = 0.0) -> BlockSpan:
    """The ``num_blocks`` consecutive blocks whose service lowers the mean need most.

    throughput: of the new server, in block passes per second; 0: the median of the others. Of equal
    spans the first is taken. If the model has fewer blocks, all of them. Raises ConfigError for a
    model without blocks.
    """
    if not coverage.num_blocks or num_blocks < 1:
        raise ConfigError("There are no blocks to choose from.", hint="Check the model's config.")
    length = min(num_blocks, coverage.num_blocks)
    share = (throughput or coverage.typical_throughput) / length
    level = coverage.level + share * length / coverage.num_blocks
    rest = _Rest(coverage.served[None], coverage.strongest[None])
    start, _ = rest.best_starts(np.array([share]), np.array([length]), level)
    return BlockSpan(int(start[0]), int(start[0]) + length)


@dataclass(frozen=True)
class BestMoves:
    """The best move of each of some servers; arrays of one entry per server.

    starts: first block after the move. gains: relative growth of the soft minimum of the dependable
    throughput; negative infinity for servers that must stay. parts: the server's share of the
    throughput of the swarm.
    """

    starts: Counts
    gains: Rates
    parts: Rates
    peers: tuple[PeerId, ...]

    def of(self, record: ServerRecord) -> tuple[int, float, float] | None:
        """Start, gain and part of one server; None if it is not among them."""
        if record.peer_id not in self.peers:
            return None
        number = self.peers.index(PeerId(record.peer_id))
        return int(self.starts[number]), float(self.gains[number]), float(self.parts[number])


def best_moves_of(coverage: Coverage, servers: tuple[ServerRecord, ...]) -> BestMoves:
    """The best move of each of ``servers``, all of which are counted in the coverage.

    A server keeps the number of its blocks. It must stay unless it is ONLINE and every block that
    it would leave has two other servers ONLINE (one is enough while some block has no server). 100
    servers of 80 blocks take about 3 ms.
    """
    lengths = np.array([length_of(record.spans) for record in servers], dtype=np.int64)
    throughputs = np.array([coverage.throughput_of(record) for record in servers])
    held = _held([record.spans for record in servers], coverage.num_blocks)
    shares = (throughputs / lengths)[:, None]
    was_first = held & (coverage.strongest <= shares)
    rest = _Rest(
        np.maximum(coverage.served - held * shares, 0.0),
        np.where(was_first, coverage.second, coverage.strongest),
    )
    starts, means = rest.best_starts(throughputs / lengths, lengths, coverage.level)
    gains = (coverage.mean_need / means) ** (1 / STEEPNESS) - 1.0
    blocks = np.arange(coverage.num_blocks)
    taken = (blocks >= starts[:, None]) & (blocks < (starts + lengths)[:, None])
    left = held & ~taken
    num_others = OTHERS_LEFT if coverage.served.all() else 1
    may_go = np.array([record.state is ServerState.ONLINE for record in servers], dtype=bool)
    may_go &= left.any(axis=1) & ~(left & (coverage.num_online <= num_others)).any(axis=1)
    return BestMoves(
        starts,
        np.where(may_go, gains, -np.inf),
        throughputs / max(1e-9, coverage.served.sum()),
        tuple(PeerId(record.peer_id) for record in servers),
    )


@dataclass(frozen=True)
class _Rest:
    """Coverages that each leave out one server: a row per coverage, a column per block."""

    served: Rates
    strongest: Rates

    def best_starts(self, shares: Rates, lengths: Counts, level: float) -> tuple[Counts, Rates]:
        """For one more server in each row: its best first block, and the mean need with it."""
        rows, num_blocks = self.served.shape
        now = need(self.served - STRONGEST_DISCOUNT * self.strongest, level)
        share = shares[:, None]
        strongest = np.maximum(self.strongest, share)
        then = need(self.served + share - STRONGEST_DISCOUNT * strongest, level)
        # Cumulative sums from both ends are added. Their differences would lose all digits, since
        # needs differ by many orders of magnitude.
        before, after, inside = np.zeros((3, rows, num_blocks + 1))
        np.cumsum(now, axis=1, out=before[:, 1:])
        after[:, :-1] = np.cumsum(now[:, ::-1], axis=1)[:, ::-1]
        np.cumsum(then, axis=1, out=inside[:, 1:])
        begins = np.arange(num_blocks)
        ends = begins + lengths[:, None]
        fits = np.minimum(ends, num_blocks)
        left = before[:, :-1] + np.take_along_axis(after + inside, fits, axis=1) - inside[:, :-1]
        left[ends > num_blocks] = np.inf
        starts = (left <= left.min(axis=1, keepdims=True) * (1 + 1e-9)).argmax(axis=1)
        return starts.astype(np.int64), left[np.arange(rows), starts] / num_blocks


def must_yield(view: View, ours: BlockSpan, me: PeerId) -> bool:
    """Whether another server is joining with an overlapping span and has the smaller peer id.

    Of servers that join at the same time with overlapping spans only that one keeps its choice.
    """
    return any(
        record.state is ServerState.JOINING
        and peer_id < me
        and any(span.overlaps(ours) for span in record.block_spans)
        for peer_id, record in view.records.items()
    )
