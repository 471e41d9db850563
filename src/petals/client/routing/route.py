"""Which servers a session should go through: a pure decision over tables.

A server may be entered at any block it holds and left after any later one, so overlapping spans are
the normal case. The cost of a route is what one step waits for: the links, the queues and the
compute of its hops. Knows no network, no clock and no chance: what is measured, and what is drawn,
comes in as values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from petals.errors import MissingBlocksError, NoCapacity, RouteError, TrainingRefused
from petals.types import BlockSpan, Hop, PeerId, Route

KEPT_PER_BLOCK = 8
"""Holders of a block that enter the exact search: 10,000 servers would make 10 million pairs."""

EXACT_UP_TO = 64
"""So few servers are searched whole."""

UNMEASURED_ROUND_TRIP_SECONDS = 0.1
"""Assumed while no link has been measured; afterwards the median of the measured ones is."""

HOP_OVERHEAD_SECONDS = 0.002
"""What a hop costs beside compute, queue and link: framing, hand-overs, scheduling."""

LITTLE_ROOM_SECONDS = 10.0
"""Added to a server that said it has too little free cache: the last resort, not ruled out."""

LITTLE_OUTBOX_SECONDS = 0.05
"""Added to a server that cannot keep what it puts out: it serves, but cannot refill the hop behind
it.
"""

LinkSeconds = Mapping[tuple[PeerId, PeerId], float]
"""Measured one-way seconds between two servers; a pair that is missing goes through the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A server as the search sees it.

    ``seconds_per_block`` is for one token. ``tokens_free`` counts KV room in tokens of one block,
    ``outbox_tokens_free`` outputs of tokens that it can keep. These and ``round_trip_seconds``
    (from here) are None where unmeasured. ``trains``: it gives gradients.
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
    """What the route is for.

    ``cache_tokens`` is the KV room per block it will ask for. ``avoid`` are servers that failed
    lately: used only where nobody else holds a block. ``exclude`` have refused this very request
    and are never used. ``is_training``: only servers that give gradients will do.
    """

    blocks: BlockSpan
    model: str = ""
    cache_tokens: int = 0
    is_training: bool = False
    avoid: frozenset[PeerId] = frozenset()
    exclude: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class _Node:
    """A candidate cut to the blocks in question, with its costs worked out once."""

    peer_id: PeerId
    start: int
    end: int
    half_trip: float
    entry: float
    per_block: float


@dataclass(slots=True)
class _Label:
    """The cheapest known way to have just run a block on ``server``, entered at ``entered``."""

    cost: float
    server: _Node
    entered: int
    before: "_Label | None" = field(repr=False)


def find_route(
    candidates: Sequence[Candidate], needs: Needs, links: LinkSeconds | None = None
) -> Route:
    """The route of least latency through ``needs.blocks``.

    Raises MissingBlocksError naming the blocks nobody holds, NoCapacity where their only holders
    are excluded, and TrainingRefused where none of them gives the gradients that are needed.
    """
    servers = _choose(candidates, needs)
    holders: dict[int, list[_Node]] = {
        block: [] for block in range(needs.blocks.start, needs.blocks.end)
    }
    for server in servers:
        for block in range(server.start, server.end):
            holders[block].append(server)
    inbound = _inbound(links or {}, servers)
    labels: dict[PeerId, _Label] = {}
    for block in range(needs.blocks.start, needs.blocks.end):
        labels = _extend(block, labels, holders[block], inbound)
    last = min(labels.values(), key=lambda label: label.cost + label.server.half_trip)
    return _unwind(last, needs.blocks.end)


def find_throughput_route(
    candidates: Sequence[Candidate], needs: Needs, draw: Callable[[], float]
) -> Route:
    """A route drawn at random, faster servers and longer spans more often.

    Many such routes share the load. ``draw`` gives numbers in [0, 1). Raises like ``find_route``.
    """
    servers = _choose(candidates, needs)
    hops: list[Hop] = []
    block = needs.blocks.start
    while block < needs.blocks.end:
        here = [server for server in servers if server.start <= block < server.end]
        weights = [(server.end - block) / max(server.per_block, 1e-9) for server in here]
        chosen = here[_weighted(weights, draw())]
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


def _choose(candidates: Sequence[Candidate], needs: Needs) -> list[_Node]:
    """The best few holders of each block: none excluded and, if possible, none avoided."""
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
    return [_server(candidate, needs, unmeasured) for candidate in kept]


def _prune(servers: list[Candidate], needs: Needs, unmeasured: float) -> list[Candidate]:
    """The best few holders of each block by time per block, each used as far as it goes."""
    if len(servers) <= EXACT_UP_TO:
        return servers
    start, end, wanted = needs.blocks.start, needs.blocks.end, needs.cache_tokens
    scores: list[float] = []
    for c in servers:  # written out: this loop sees every server of the swarm
        blocks = c.blocks
        first = blocks.start if blocks.start > start else start
        length = (blocks.end if blocks.end < end else end) - first
        trip = c.round_trip_seconds
        entry = (unmeasured if trip is None else trip) + c.queue_seconds + HOP_OVERHEAD_SECONDS
        if c.tokens_free is not None and c.tokens_free < wanted * length:
            entry += LITTLE_ROOM_SECONDS
        scores.append(entry / length + c.seconds_per_block)
    room = dict.fromkeys(range(start, end), KEPT_PER_BLOCK)
    kept: list[Candidate] = []
    for index in sorted(range(len(servers)), key=scores.__getitem__):
        blocks = servers[index].blocks
        wanting = [block for block in range(blocks.start, blocks.end) if block in room]
        if not wanting:
            continue
        kept.append(servers[index])
        for block in wanting:
            room[block] -= 1
            if not room[block]:
                del room[block]
        if not room:
            break
    return kept


def _server(candidate: Candidate, needs: Needs, unmeasured: float) -> _Node:
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


def _inbound(
    links: LinkSeconds, servers: Sequence[_Node]
) -> dict[PeerId, list[tuple[PeerId, float]]]:
    """Measured links by their far end, among the servers that are left."""
    if not links:
        return {}
    alive = {server.peer_id for server in servers}
    inbound: dict[PeerId, list[tuple[PeerId, float]]] = {}
    for (near, far), seconds in links.items():
        if near in alive and far in alive:
            inbound.setdefault(far, []).append((near, seconds))
    return inbound


def _extend(
    block: int,
    labels: dict[PeerId, _Label],
    holders: Sequence[_Node],
    inbound: Mapping[PeerId, list[tuple[PeerId, float]]],
) -> dict[PeerId, _Label]:
    """Labels at the boundary before ``block`` -> labels at the boundary after it."""
    leave = min(
        labels.values(), key=lambda label: label.cost + label.server.half_trip, default=None
    )
    base = leave.cost + leave.server.half_trip if leave is not None else 0.0
    extended: dict[PeerId, _Label] = {}
    for server in holders:
        cost, before = base + server.half_trip, leave
        for near, seconds in inbound.get(server.peer_id, ()):
            label = labels.get(near)
            if label is not None and label.cost + seconds < cost:
                cost, before = label.cost + seconds, label
        cost += server.entry
        entered = block
        stay = labels.get(server.peer_id)
        if stay is not None and stay.server is server and stay.cost <= cost:
            cost, before, entered = stay.cost, stay.before, stay.entered
        known = extended.get(server.peer_id)
        if known is None or cost + server.per_block < known.cost:
            extended[server.peer_id] = _Label(cost + server.per_block, server, entered, before)
    return extended


def _unwind(last: _Label, end: int) -> Route:
    hops: list[Hop] = []
    label: _Label | None = last
    while label is not None:
        hops.append(Hop(label.server.peer_id, BlockSpan(label.entered, end)))
        end, label = label.entered, label.before
    return tuple(reversed(hops))


def _weighted(weights: Sequence[float], drawn: float) -> int:
    threshold = drawn * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1
