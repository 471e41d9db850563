"""Which blocks a server should hold: those that are served worst, with spares counted in.

One picture of the swarm serves two questions: what should a new server take, and would the swarm
gain if one moved? Values in, values out: no clock, no chance, no network; ``rebalancing`` adds
when to look and whose turn it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np
import numpy.typing as npt

from petals.errors import ConfigError
from petals.swarm.records import ServerRecord, View
from petals.types import BlockSpan, PeerId, ServerState

UNMEASURED_THROUGHPUT = 1.0
"""Assumed of a server that is still joining where no other has been measured either."""

STRONGEST_DISCOUNT = 0.9
"""How much of a block's strongest server is left out of the block's worth: it may be the next to
die. So a block with one fast server is worse off than one with two that are half as fast.
"""

Rates = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """What every block of a model has, in tokens per second; arrays of one entry per block.

    ``served`` sums the shares of the servers that are online or joining; ``strongest`` and
    ``second`` are the largest two of those shares. ``num_online`` counts servers that could take
    over at once. ``num_servers`` is everybody who counts.
    """

    served: Rates
    strongest: Rates
    second: Rates
    num_online: Counts
    num_servers: int
    typical_throughput: float

    @cached_property
    def worth(self) -> Rates:
        """What the blocks are worth to the swarm: what is served, less a part of the strongest."""
        return self.served - STRONGEST_DISCOUNT * self.strongest

    @cached_property
    def weakest(self) -> float:
        """Worth of the weakest block: the bottleneck."""
        return float(self.worth.min(initial=np.inf))

    @cached_property
    def level(self) -> float:
        """Worth of every block, were it spread evenly: no placement can lift the weakest above."""
        return float(self.worth.mean()) if len(self.worth) else 0.0

    def throughput_of(self, record: ServerRecord) -> float:
        """Block passes per second of a server; those that do not say count as typical."""
        return record.throughput or self.typical_throughput

    def without(self, record: ServerRecord) -> "Picture":
        """The swarm if this server, which is in the picture, were gone."""
        share = share_of(record, self.throughput_of(record))
        served, strongest, second = self.served.copy(), self.strongest.copy(), self.second.copy()
        num_online = self.num_online.copy()
        for start, end in record.spans:
            served[start:end] = np.maximum(served[start:end] - share, 0.0)
            was_first = strongest[start:end] <= share
            strongest[start:end] = np.where(was_first, second[start:end], strongest[start:end])
            if record.state is ServerState.ONLINE:
                num_online[start:end] -= 1
        return Picture(
            served, strongest, second, num_online, self.num_servers - 1, self.typical_throughput
        )

    def worth_with(self, blocks: BlockSpan, throughput: float) -> Rates:
        """The blocks' worth if one more server of this throughput held ``blocks``."""
        share = throughput / max(1, len(blocks))
        served, strongest = self.served.copy(), self.strongest.copy()
        here = slice(blocks.start, blocks.end)
        served[here] += share
        strongest[here] = np.maximum(strongest[here], share)
        return served - STRONGEST_DISCOUNT * strongest


def share_of(record: ServerRecord, throughput: float) -> float:
    """Tokens per second that a server gives each of its blocks when all are asked for equally."""
    return throughput / max(1, sum(end - start for start, end in record.spans))


def picture_of(view: View, without: Iterable[PeerId] = ()) -> Picture:
    """The swarm of ``view`` without some servers. 10,000 records take about 10 ms."""
    ignored = frozenset(without)
    counted = [
        record
        for peer_id, record in view.records.items()
        if record.state in (ServerState.ONLINE, ServerState.JOINING) and peer_id not in ignored
    ]
    typical = median([r.throughput for r in counted if r.throughput] or [UNMEASURED_THROUGHPUT])
    spans = [
        (start, end, share_of(r, r.throughput or typical), r.state is ServerState.ONLINE)
        for r in counted
        for start, end in r.spans
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
    return Picture(
        served, strongest, second, num_online.astype(np.int64), len(counted), float(typical)
    )


def throughput_by_block(view: View, without: Iterable[PeerId] = ()) -> tuple[float, ...]:
    """What each block is worth, servers that are online or joining counted; see ``Picture``."""
    return tuple(float(worth) for worth in picture_of(view, without).worth)


def choose_span(served: Sequence[float] | Rates, num_blocks: int) -> BlockSpan:
    """The ``num_blocks`` consecutive blocks that are served worst.

    ``served`` holds one worth per block of the model. Spans are compared by their weakest block,
    then by the second weakest and so on; the first of equals is taken. More blocks than the model
    has means all of them. Raises ConfigError for a model without blocks.
    """
    if not len(served) or num_blocks < 1:
        raise ConfigError("There are no blocks to choose from.", hint="Check the model's config.")
    length = min(num_blocks, len(served))
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(served, np.float64), length)
    lowest = windows.min(axis=1)
    tied = np.flatnonzero(lowest == lowest.min())
    best = int(min(tied, key=lambda start: sorted(windows[start].tolist())))
    return BlockSpan(best, best + length)


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
