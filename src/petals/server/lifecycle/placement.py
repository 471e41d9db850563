"""Which blocks a server should hold: those by which the swarm as a whole gains most.

One picture of the swarm serves two questions: what should a new server take, and who would help
most by moving? Values in, values out: no clock, no chance, no network; ``rebalancing`` adds when to
look and whose turn it is.
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
"""Assumed of a server that is still joining where no other has been measured either."""

STRONGEST_DISCOUNT = 0.9
"""How much of a block's strongest server is left out of the block's worth: it may be the next to
die. So a block with one fast server is worse off than one with two that are half as fast.
"""

STEEPNESS = 8
"""How much more a weak block weighs than a strong one: half the worth is 2**8 times the need."""

SHIFTING_ROUNDS = 16
"""After which a swarm of 30 or 100 is within some per cent of the best division of its passes."""

LEAST_WORTH = 1 / 1024
"""Of the even level. Blocks that have less are all as bad, and nobody's blocks worse by GAP_FACTOR:
in a large swarm a first holder is worth little, and a great gain all the same.
"""

GAP_FACTOR = 16.0

OTHERS_LEFT = 2
"""Who must be online at a block that a server leaves: the only one left may be the next to die."""

MOST_COMPARED = 256
"""Servers whose best moves are worked out; in larger swarms they are a sample of all."""

Rates = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """What every block of a model has, in tokens per second; arrays of one entry per block.

    ``served`` sums the shares of the servers that are online, joining or moving there;
    ``strongest`` and ``second`` are the largest two of those shares. ``num_online`` counts servers
    that could take over at once. ``servers`` is everybody who counts.
    """

    served: Rates
    strongest: Rates
    second: Rates
    num_online: Counts
    servers: tuple[ServerRecord, ...]
    typical_throughput: float

    @cached_property
    def worth(self) -> Rates:
        """What the blocks are worth to the swarm: what is served, less a part of the strongest."""
        return self.served - STRONGEST_DISCOUNT * self.strongest

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return len(self.served)

    @property
    def level(self) -> float:
        """What every block would have, were all shares spread evenly."""
        return float(self.served.mean()) if len(self.served) else 0.0

    @cached_property
    def mean_need(self) -> float:
        """Of all blocks; what a join or a move should lower."""
        return float(need(self.worth, self.level).mean()) if self.level else np.inf

    @cached_property
    def carried(self) -> float:
        """See ``carried_by``."""
        servers = [(blocks_held(r), self.throughput_of(r)) for r in self.servers]
        return carried_by(servers, self.num_blocks)

    def carried_if(self, moved: ServerRecord, blocks: BlockSpan) -> float:
        """The same if one of the servers held ``blocks`` instead."""
        there = ((blocks.start, blocks.end),)
        servers = [
            (there if r is moved else blocks_held(r), self.throughput_of(r)) for r in self.servers
        ]
        return carried_by(servers, self.num_blocks)

    @cached_property
    def offers(self) -> "Offers":
        """The best single moves of all servers; in large swarms of every so many-th."""
        return offers_of(self, self.servers[:: 1 + len(self.servers) // MOST_COMPARED])

    def throughput_of(self, record: ServerRecord) -> float:
        """Block passes per second of a server; those that do not say count as typical."""
        return record.throughput or self.typical_throughput


def need(worth: Rates, level: float) -> Rates:
    """How badly blocks of this worth want another server: 1 at the even level, far more below."""
    needs = (np.maximum(worth, LEAST_WORTH * level) / level) ** -STEEPNESS
    return np.asarray(np.where(worth > 1e-9 * level, needs, needs * GAP_FACTOR))


def bottleneck_of(needs: Rates) -> float:
    """The share of the even level that blocks of these needs can give: a soft minimum."""
    return float(needs.mean() ** (-1 / STEEPNESS))


def blocks_held(record: ServerRecord) -> tuple[BlockRange, ...]:
    """Where a server gives its passes, now or soon: empty for one that goes or is gone."""
    if record.state in (ServerState.ONLINE, ServerState.JOINING):
        return record.spans
    return record.next_spans if record.state is ServerState.DRAINING else ()


def length_of(spans: Iterable[BlockRange]) -> int:
    """How many blocks these are."""
    return sum(end - start for start, end in spans)


def picture_of(view: View, without: Iterable[PeerId] = ()) -> Picture:
    """The swarm of ``view`` without some servers. 10,000 records take about 50 ms."""
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
    return Picture(served, strongest, second, num_online.astype(np.int64), counted, float(typical))


def carried_by(servers: Iterable[tuple[tuple[BlockRange, ...], float]], num_blocks: int) -> float:
    """Which part of its even level a swarm can carry where it is weakest, 0 to 1.

    ``servers``: spans and block passes per second of each. Clients go where queues are short, so
    each server gives most to those of its blocks that have least: from even shares on it shifts
    towards them for a few rounds. A soft minimum: many weak blocks count for more than one.
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
    """A row for each, a column per block."""
    held = np.zeros((len(spans), num_blocks), dtype=bool)
    for row, blocks in zip(held, spans):
        for start, end in blocks:
            row[start:end] = True
    return held


def choose_blocks(picture: Picture, num_blocks: int, throughput: float = 0.0) -> BlockSpan:
    """The ``num_blocks`` consecutive blocks where one more server helps the swarm most.

    ``throughput``: of that server, in block passes per second; 0 counts as typical. The first of
    equals is taken. More blocks than the model has means all of them. Raises ConfigError for a
    model without blocks.
    """
    if not picture.num_blocks or num_blocks < 1:
        raise ConfigError("There are no blocks to choose from.", hint="Check the model's config.")
    length = min(num_blocks, picture.num_blocks)
    share = (throughput or picture.typical_throughput) / length
    level = picture.level + share * length / picture.num_blocks
    rest = _Rest(picture.served[None], picture.strongest[None])
    start, _ = rest.best_starts(np.array([share]), np.array([length]), level)
    return BlockSpan(int(start[0]), int(start[0]) + length)


@dataclass(frozen=True)
class Offers:
    """What each of some servers would do best; arrays of one entry per server.

    ``gains``: by which part the weakest worth (a soft minimum) would grow; negative infinity for
    those who must stay. ``parts``: how much of the swarm's throughput each of them is.
    """

    starts: Counts
    gains: Rates
    parts: Rates
    peers: tuple[PeerId, ...]

    def of(self, record: ServerRecord) -> tuple[int, float, float] | None:
        """Start, gain and part of one of them; None if it is not among them."""
        if record.peer_id not in self.peers:
            return None
        number = self.peers.index(PeerId(record.peer_id))
        return int(self.starts[number]), float(self.gains[number]), float(self.parts[number])


def offers_of(picture: Picture, servers: tuple[ServerRecord, ...]) -> Offers:
    """The best single move of each of ``servers``, which are in the picture.

    A server keeps the number of its blocks. It must stay while it is not ONLINE and where a block
    that it would leave has fewer than two others who are (one is enough while there is a gap). 100
    servers of 80 blocks take about 3 ms.
    """
    lengths = np.array([length_of(record.spans) for record in servers], dtype=np.int64)
    throughputs = np.array([picture.throughput_of(record) for record in servers])
    held = _held([record.spans for record in servers], picture.num_blocks)
    shares = (throughputs / lengths)[:, None]
    was_first = held & (picture.strongest <= shares)
    rest = _Rest(
        np.maximum(picture.served - held * shares, 0.0),
        np.where(was_first, picture.second, picture.strongest),
    )
    starts, means = rest.best_starts(throughputs / lengths, lengths, picture.level)
    gains = (picture.mean_need / means) ** (1 / STEEPNESS) - 1.0
    blocks = np.arange(picture.num_blocks)
    taken = (blocks >= starts[:, None]) & (blocks < (starts + lengths)[:, None])
    left = held & ~taken
    num_others = OTHERS_LEFT if picture.served.all() else 1
    may_go = np.array([record.state is ServerState.ONLINE for record in servers], dtype=bool)
    may_go &= left.any(axis=1) & ~(left & (picture.num_online <= num_others)).any(axis=1)
    return Offers(
        starts,
        np.where(may_go, gains, -np.inf),
        throughputs / max(1e-9, picture.served.sum()),
        tuple(PeerId(record.peer_id) for record in servers),
    )


@dataclass(frozen=True)
class _Rest:
    """Swarms that each lack one server: a row per swarm, a column per block."""

    served: Rates
    strongest: Rates

    def best_starts(self, shares: Rates, lengths: Counts, level: float) -> tuple[Counts, Rates]:
        """For one more server in each row: where it should start, and the mean need then."""
        rows, num_blocks = self.served.shape
        now = need(self.served - STRONGEST_DISCOUNT * self.strongest, level)
        share = shares[:, None]
        strongest = np.maximum(self.strongest, share)
        then = need(self.served + share - STRONGEST_DISCOUNT * strongest, level)
        # Sums of what stays and of what comes, not differences: needs differ by many digits.
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
    """Did somebody announce the same choice at the same time, and is it theirs to keep?

    Of servers that join with overlapping spans the one with the smallest peer id stays.
    """
    return any(
        record.state is ServerState.JOINING
        and peer_id < me
        and any(span.overlaps(ours) for span in record.block_spans)
        for peer_id, record in view.records.items()
    )
