"""Chooses the servers of a session's route: a pure decision over a table of candidates.

A hop may begin at any block that its server holds and end after any later one, so overlapping spans
are the normal case. The cost of a route is the time (s) of one step: links, queues and compute of
its hops. Measurements and random numbers are arguments; knows no network and no clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from petals.errors import MissingBlocksError, NoCapacity, RouteError, TrainingRefused
from petals.types import BlockSpan, Hop, PeerId, Route

KEPT_PER_BLOCK = 8
"""Servers per block that enter the exact search, if there are more than ``EXACT_UP_TO`` in all: the
search takes time in proportion to the number of (server, block) pairs, and swarms of 10,000 servers
are intended.
"""

EXACT_UP_TO = 64
"""Number of servers up to which all of them enter the exact search."""

UNMEASURED_ROUND_TRIP_SECONDS = 0.1
"""Round trip (s) assumed for every server while none is measured; as soon as one is, the median of
the measured ones is assumed for the others.
"""

HOP_OVERHEAD_SECONDS = 0.002
"""Time (s) of a hop beside compute, queue and link: framing, thread switches, scheduling."""

LITTLE_ROOM_SECONDS = 10.0
"""Penalty (s) for a server that announces less free cache than needed. It is not excluded, because
the announcement may be outdated, but any route that is less than 10 s slower is preferred.
"""

LITTLE_OUTBOX_SECONDS = 0.05
"""Penalty (s) for a server without room in its outbox. It can serve, but it cannot send its outputs
again to a replacement of the next hop.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A server that holds blocks, with what is known of it.

    seconds_per_block: compute time of one token in one block.
    queue_seconds: time that a step waits before it runs.
    round_trip_seconds: between this client and the server; None if not measured.
    tokens_free: free KV memory, in tokens of one block; None if not announced.
    outbox_tokens_free: tokens whose outputs the server can still keep; None if not announced.
    trains: whether it computes gradients.
    """

    peer_id: PeerId
    blocks: BlockSpan
    seconds_per_block: float
    queue_seconds: float = 0.0
    round_trip_seconds: float | None = None
    tokens_free: int | None = None
    outbox_tokens_free: int | None = None
    trains: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a route must provide.

    blocks: the blocks to run. model: its name, for error messages.
    cache_tokens: KV memory per block that will be reserved, in tokens.
    is_training: only servers that compute gradients may be used.
    avoid: servers that failed lately; used only where no other server holds a block.
    exclude: servers that have refused this request; never used.
    """

    blocks: BlockSpan
    model: str = ""
    cache_tokens: int = 0
    is_training: bool = False
    avoid: frozenset[PeerId] = frozenset()
    exclude: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class _Node:
    """A candidate cut to the needed blocks, with its costs in seconds.

    half_trip: half the round trip to the client. entry: paid once per hop. per_block: paid for each
    block of the hop.
    """

    peer_id: PeerId
    start: int
    end: int
    half_trip: float
    entry: float
    per_block: float


@dataclass(slots=True)
class _Label:
    """The cheapest route that ends with a certain block on ``server``.

    The last hop began at block ``entered``; ``before`` is the label of the hop before it. ``cost``
    (s) includes everything but leaving the last server.
    """

    cost: float
    server: _Node
    entered: int
    before: "_Label | None" = field(repr=False)

    @property
    def exit_cost(self) -> float:
        """``cost`` and half a round trip from the last server back to the client."""
        return self.cost + self.server.half_trip


def find_route(candidates: Sequence[Candidate], needs: Needs) -> Route:
    """The route through ``needs.blocks`` whose step takes the least time.

    Raises MissingBlocksError with the blocks that no server holds, NoCapacity if their only holders
    are excluded, TrainingRefused if gradients are needed and none of their holders computes them.
    """
    servers = _select(candidates, needs)
    holders: dict[int, list[_Node]] = {
        block: [] for block in range(needs.blocks.start, needs.blocks.end)
    }
    for server in servers:
        for block in range(server.start, server.end):
            holders[block].append(server)
    labels: dict[PeerId, _Label] = {}
    for block in range(needs.blocks.start, needs.blocks.end):
        labels = _extend(block, labels, holders[block])
    return _hops_of(_cheapest_exit(labels.values()), needs.blocks.end)


def find_throughput_route(
    candidates: Sequence[Candidate], needs: Needs, draw: Callable[[], float]
) -> Route:
    """A random route; each hop is drawn with a weight of (blocks it runs) / (seconds per block).

    Many clients with such routes spread their load over the servers. ``draw`` returns numbers in
    [0, 1). Raises what ``find_route`` raises.
    """
    servers = _select(candidates, needs)
    hops: list[Hop] = []
    block = needs.blocks.start
    while block < needs.blocks.end:
        here = [server for server in servers if server.start <= block < server.end]
        weights = [(server.end - block) / max(server.per_block, 1e-9) for server in here]
        chosen = here[_draw_index(weights, draw())]
        hops.append(Hop(chosen.peer_id, BlockSpan(block, chosen.end)))
        block = chosen.end
    return tuple(hops)


def missing_blocks(spans: Iterable[BlockSpan], wanted: BlockSpan) -> tuple[BlockSpan, ...]:
    """The parts of ``wanted`` that none of ``spans`` covers, in order."""
    gaps: list[BlockSpan] = []
    reached = wanted.start
    for start, end in sorted({(span.start, span.end) for span in spans}):
        if start > reached:
            gaps.append(BlockSpan(reached, min(start, wanted.end)))
        reached = max(reached, end)
        if reached >= wanted.end:
            return tuple(gap for gap in gaps if len(gap))
    gaps.append(BlockSpan(reached, wanted.end))
    return tuple(gap for gap in gaps if gap.start < gap.end)


def _select(candidates: Sequence[Candidate], needs: Needs) -> list[_Node]:
    """The servers that enter the search: none excluded and, if the blocks allow it, none avoided.

    Raises what ``find_route`` raises.
    """
    start, end = needs.blocks.start, needs.blocks.end
    held = [c for c in candidates if c.blocks.start < end and c.blocks.end > start]
    willing = [c for c in held if c.peer_id not in needs.exclude] if needs.exclude else held
    if needs.is_training:
        willing = [c for c in willing if c.trains]
    usable = [c for c in willing if c.peer_id not in needs.avoid] if needs.avoid else willing
    measured = [c.round_trip_seconds for c in held if c.round_trip_seconds is not None]
    unmeasured = median(measured) if measured else UNMEASURED_ROUND_TRIP_SECONDS
    kept = _prune(usable, needs, unmeasured)
    if missing_blocks((c.blocks for c in kept), needs.blocks):
        kept = _prune(willing, needs, unmeasured)
        gaps = missing_blocks((c.blocks for c in kept), needs.blocks)
        if gaps:
            raise _no_route(gaps, held, needs)
    return [_node(candidate, needs, unmeasured) for candidate in kept]


def _prune(servers: list[Candidate], needs: Needs, unmeasured: float) -> list[Candidate]:
    """The best ``KEPT_PER_BLOCK`` servers of each block, by time per block.

    The time of a server that runs all its needed blocks counts: it shares the cost of a hop among
    them. A server that is kept for one block is kept for all its blocks.
    """
    if len(servers) <= EXACT_UP_TO:
        return servers
    start, end, wanted = needs.blocks.start, needs.blocks.end, needs.cache_tokens
    scores: list[float] = []
    # The costs of ``_node``, written out: this loop runs over all servers of the swarm.
    for c in servers:
        blocks = c.blocks
        first = blocks.start if blocks.start > start else start
        length = (blocks.end if blocks.end < end else end) - first
        trip = c.round_trip_seconds
        entry = (unmeasured if trip is None else trip) + c.queue_seconds + HOP_OVERHEAD_SECONDS
        if c.tokens_free is not None and c.tokens_free < wanted * length:
            entry += LITTLE_ROOM_SECONDS
        scores.append(entry / length + c.seconds_per_block)
    places = dict.fromkeys(range(start, end), KEPT_PER_BLOCK)
    kept: list[Candidate] = []
    for index in sorted(range(len(servers)), key=scores.__getitem__):
        blocks = servers[index].blocks
        open_blocks = [block for block in range(blocks.start, blocks.end) if block in places]
        if not open_blocks:
            continue
        kept.append(servers[index])
        for block in open_blocks:
            places[block] -= 1
            if not places[block]:
                del places[block]
        if not places:
            break
    return kept


def _node(candidate: Candidate, needs: Needs, unmeasured: float) -> _Node:
    round_trip = candidate.round_trip_seconds
    half_trip = (unmeasured if round_trip is None else round_trip) / 2
    start = max(candidate.blocks.start, needs.blocks.start)
    end = min(candidate.blocks.end, needs.blocks.end)
    entry = HOP_OVERHEAD_SECONDS + candidate.queue_seconds
    wanted, kept = needs.cache_tokens * (end - start), candidate.outbox_tokens_free
    if candidate.tokens_free is not None and candidate.tokens_free < wanted:
        entry += LITTLE_ROOM_SECONDS
    if kept is not None and kept < needs.cache_tokens:
        entry += LITTLE_OUTBOX_SECONDS
    return _Node(candidate.peer_id, start, end, half_trip, entry, candidate.seconds_per_block)


def _no_route(
    gaps: tuple[BlockSpan, ...], held: Sequence[Candidate], needs: Needs
) -> RouteError | TrainingRefused:
    """The error for ``gaps``: no server holds the blocks, trains them or accepts the request."""
    named = ", ".join(str(gap) for gap in gaps)
    of_model = f" of {needs.model}" if needs.model else ""
    if missing_blocks((c.blocks for c in held), needs.blocks):
        return MissingBlocksError(
            f"Nobody serves blocks {named}{of_model}.",
            hint=f"Start one: petals serve {needs.model or 'MODEL'} --blocks {gaps[0]} --join "
            "ADDR. `petals status --join ADDR` shows who serves what.",
        )
    if needs.is_training and missing_blocks((c.blocks for c in held if c.trains), needs.blocks):
        return TrainingRefused(
            f"All servers that hold blocks {named}{of_model} give no gradients.",
            hint=f"Start one that does: petals serve {needs.model or 'MODEL'} --blocks {gaps[0]} "
            "--join ADDR, without --no-training and in a precision that trains.",
        )
    return NoCapacity(
        f"All servers that hold blocks {named}{of_model} have refused this request.",
        hint="Wait until other sessions end, ask for less, or start another server.",
    )


def _extend(
    block: int, labels: dict[PeerId, _Label], holders: Sequence[_Node]
) -> dict[PeerId, _Label]:
    """The labels at the boundary after ``block``, from those at the boundary before it.

    Every holder of the block can be entered from the cheapest label, whichever server that is on:
    the link of a hop is counted as the round trip between client and server, half on entering and
    half on leaving, so that its cost does not depend on the other server. Therefore one pass over
    the blocks finds the best route, in time proportional to the number of (server, block) pairs.
    """
    best = _cheapest_exit(labels.values())
    base = best.exit_cost if best is not None else 0.0
    extended: dict[PeerId, _Label] = {}
    for server in holders:
        cost, entered, before = base + server.half_trip + server.entry, block, best
        stay = labels.get(server.peer_id)
        if stay is not None and stay.server is server and stay.cost <= cost:
            cost, entered, before = stay.cost, stay.entered, stay.before
        known = extended.get(server.peer_id)
        if known is None or cost + server.per_block < known.cost:
            extended[server.peer_id] = _Label(cost + server.per_block, server, entered, before)
    return extended


def _cheapest_exit(labels: Iterable[_Label]) -> _Label | None:
    return min(labels, key=lambda label: label.exit_cost, default=None)


def _hops_of(last: _Label | None, end: int) -> Route:
    """The hops of the route that ``last`` ends with, in order."""
    hops: list[Hop] = []
    label = last
    while label is not None:
        hops.append(Hop(label.server.peer_id, BlockSpan(label.entered, end)))
        end, label = label.entered, label.before
    return tuple(reversed(hops))


def _draw_index(weights: Sequence[float], drawn: float) -> int:
    """The index that ``drawn``, a number in [0, 1), selects with these weights."""
    threshold = drawn * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1
