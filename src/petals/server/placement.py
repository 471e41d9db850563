"""Which blocks a new server should hold: the part of the model that is served worst.

Values in, values out: no clock, no chance, no network.
"""

from collections.abc import Iterable, Sequence

from petals.errors import ConfigError
from petals.swarm.records import View
from petals.types import BlockSpan, PeerId, ServerState

UNMEASURED_THROUGHPUT = 1.0
"""Assumed of a server that is still joining: little, but more than nobody."""


def throughput_by_block(view: View, without: Iterable[PeerId] = ()) -> tuple[float, ...]:
    """What all servers that are online or joining give to each block, in their own measure."""
    ignored = frozenset(without)
    total = [0.0] * view.num_blocks
    for peer_id, record in view.records.items():
        if peer_id in ignored or record.state not in (ServerState.ONLINE, ServerState.JOINING):
            continue
        for span in record.block_spans:
            for block in range(span.start, min(span.end, view.num_blocks)):
                total[block] += record.throughput or UNMEASURED_THROUGHPUT
    return tuple(total)


def choose_span(served: Sequence[float], num_blocks: int) -> BlockSpan:
    """The ``num_blocks`` consecutive blocks that are served worst.

    ``served`` holds one throughput per block of the model. Spans are compared by their weakest
    block, then by the second weakest and so on; the first of equals is taken. More blocks than the
    model has means all of them. Raises ConfigError for a model without blocks.
    """
    if not served or num_blocks < 1:
        raise ConfigError("There are no blocks to choose from.", hint="Check the model's config.")
    length = min(num_blocks, len(served))
    starts = range(len(served) - length + 1)
    best = min(starts, key=lambda start: sorted(served[start : start + length]))
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
