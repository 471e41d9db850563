"""Which servers a session runs through."""

import random
from collections.abc import Iterable

import pytest

from petals.client.routing.route import (
    Candidate,
    Needs,
    find_route,
    find_throughput_route,
    missing_blocks,
)
from petals.errors import MissingBlocksError, NoCapacity, PetalsError, TrainingRefused
from petals.types import BlockSpan, Hop, PeerId, Route


def server(
    name: str, start: int, end: int, *, speed: float = 0.01, **costs: float | int
) -> Candidate:
    return Candidate(
        peer_id=PeerId(name), blocks=BlockSpan(start, end), seconds_per_block=speed, **costs
    )


def needs(start: int, end: int, **options: object) -> Needs:
    return Needs(blocks=BlockSpan(start, end), **options)


def peers(*names: str) -> frozenset[PeerId]:
    return frozenset(map(PeerId, names))


@pytest.mark.parametrize(
    ("table", "start", "end", "route"),
    [
        (
            [server("c", 20, 30), server("a", 0, 10), server("b", 10, 20)],
            *(0, 30, [("a", 0, 10), ("b", 10, 20), ("c", 20, 30)]),
        ),
        ([server("a", 0, 10), server("b", 10, 20)], 3, 12, [("a", 3, 10), ("b", 10, 12)]),
        ([server("a", 0, 5), server("b", 5, 10), server("all", 0, 10)], 0, 10, [("all", 0, 10)]),
        (
            [
                server("slow", 0, 8, speed=0.05, round_trip_seconds=0.001),
                server("fast", 4, 12, speed=0.001, round_trip_seconds=0.001),
            ],
            *(0, 12, [("slow", 0, 4), ("fast", 4, 12)]),
        ),
    ],
    ids=["spans in a row", "parts of spans", "fewer hops", "cut where the faster begins"],
)
def test_spans_are_joined(
    table: list[Candidate], start: int, end: int, route: list[tuple[str, int, int]]
) -> None:
    expected = tuple(Hop(PeerId(name), BlockSpan(*span)) for name, *span in route)
    assert find_route(table, needs(start, end)) == expected


NEAR = server("near", 0, 4, round_trip_seconds=0.002)
FAR = server("far", 0, 4, speed=0.001, round_trip_seconds=0.2)
BUSY = server("busy", 0, 4, queue_seconds=0.5)
IDLE = server("idle", 0, 4, speed=0.02)
SMALL = server("small", 0, 4, tokens_free=100)
SLOW = server("slow", 0, 4, speed=0.5)
FULL_OUTBOX = server("full", 0, 4, outbox_tokens_free=99)
ROOMY = server("roomy", 0, 4, speed=0.015, outbox_tokens_free=100)
SLOW_ROOMY = server("slow", 0, 4, speed=0.1, outbox_tokens_free=100)
TRAINS = server("trains", 0, 4, speed=0.5)
READS = server("reads", 0, 4, trains=False)
BAD = server("bad", 0, 4, speed=0.001)


@pytest.mark.parametrize(
    ("table", "options", "name"),
    [
        ([NEAR, FAR], {}, "near"),
        ([BUSY, IDLE], {}, "idle"),
        ([SMALL, SLOW], {"cache_tokens": 20}, "small"),
        # Little room is the last resort.
        ([SMALL, SLOW], {"cache_tokens": 30}, "slow"),
        ([SMALL], {"cache_tokens": 30}, "small"),
        # A server that keeps outputs is preferred if it costs little.
        ([FULL_OUTBOX, ROOMY], {"cache_tokens": 100}, "roomy"),
        ([FULL_OUTBOX, SLOW_ROOMY], {"cache_tokens": 100}, "full"),
        ([TRAINS, READS], {}, "reads"),
        ([TRAINS, READS], {"is_training": True}, "trains"),
        # Servers to avoid serve only where no other does.
        ([BAD, NEAR], {"avoid": peers("bad")}, "near"),
        ([BAD], {"avoid": peers("bad")}, "bad"),
    ],
)
def test_the_cheapest_server_that_fits_is_chosen(
    table: list[Candidate], options: dict[str, object], name: str
) -> None:
    assert [hop.peer_id for hop in find_route(table, needs(0, 4, **options))] == [name]


GAPS = [server("a", 0, 10), server("b", 20, 25), server("c", 26, 30)]


@pytest.mark.parametrize(
    ("table", "needed", "error", "message", "hint"),
    [
        (GAPS, needs(0, 30, model="tiny"), MissingBlocksError, "10:20, 25:26 of tiny", "10:20"),
        ([], needs(0, 30, model="m"), MissingBlocksError, "0:30", "petals serve m --blocks 0:30"),
        (
            [server("a", 0, 4), server("b", 4, 8)],
            *(needs(0, 8, exclude=peers("b")), NoCapacity, "4:8", ""),
        ),
        ([READS], needs(0, 4, is_training=True), TrainingRefused, "0:4", ""),
        ([TRAINS, READS], needs(0, 5, is_training=True), MissingBlocksError, "4:5", ""),
    ],
)
def test_blocks_without_a_server_are_named(
    table: list[Candidate], needed: Needs, error: type[PetalsError], message: str, hint: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        find_route(table, needed)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ([], [(2, 9)]),
        ([(0, 20)], []),
        ([(0, 1), (30, 40)], [(2, 9)]),
        ([(3, 5), (4, 6), (8, 9)], [(2, 3), (6, 8)]),
        ([(2, 5), (5, 7)], [(7, 9)]),
    ],
)
def test_missing_blocks(spans: list[tuple[int, int]], missing: list[tuple[int, int]]) -> None:
    found = missing_blocks((BlockSpan(*span) for span in spans), BlockSpan(2, 9))
    assert found == tuple(BlockSpan(*gap) for gap in missing)


def crowd(rng: random.Random, num_servers: int, num_blocks: int, longest: int) -> list[Candidate]:
    """Servers of random costs; two slow ones serve all blocks together."""
    half, costs = num_blocks // 2, {"round_trip_seconds": 0.1, "speed": 0.1}
    table = [server("first", 0, half, **costs), server("last", half, num_blocks, **costs)]
    for number in range(num_servers):
        start = rng.randrange(num_blocks)
        table.append(
            server(
                *(f"p{number}", start, min(num_blocks, start + rng.randint(1, longest))),
                speed=rng.uniform(0.001, 0.05),
                queue_seconds=rng.uniform(0, 0.05),
                round_trip_seconds=rng.uniform(0, 0.1),
            )
        )
    return table


def cost(route: Route, table: Iterable[Candidate]) -> float:
    servers, total = {one.peer_id: one for one in table}, 0.0
    for hop in route:
        one = servers[hop.peer_id]
        assert one.blocks.covers(hop.blocks)
        total += 0.002 + one.queue_seconds + one.round_trip_seconds
        total += len(hop.blocks) * one.seconds_per_block
    return total


def assert_covers(route: Route, start: int, end: int) -> None:
    assert (route[0].blocks.start, route[-1].blocks.end) == (start, end)
    assert all(a.blocks.end == b.blocks.start for a, b in zip(route, route[1:], strict=False))


def lowest_cost(table: list[Candidate], num_blocks: int) -> float:
    """By trying every cut and every server."""
    best = {num_blocks: 0.0}
    for start in range(num_blocks - 1, -1, -1):
        best[start] = min(
            cost((Hop(one.peer_id, BlockSpan(start, cut)),), [one]) + best[cut]
            for one in table
            if start in one.blocks
            for cut in range(start + 1, one.blocks.end + 1)
        )
    return best[0]


@pytest.mark.parametrize("seed", range(20))
def test_no_route_costs_less(seed: int) -> None:
    table = crowd(random.Random(seed), 5, 7, longest=7)
    route = find_route(table, needs(0, 7))
    assert_covers(route, 0, 7)
    assert cost(route, table) == pytest.approx(lowest_cost(table, 7))


def test_the_pruned_search_in_a_crowd_costs_at_most_5_percent() -> None:
    table = crowd(random.Random(7), 600, 40, longest=20)
    assert cost(find_route(table, needs(0, 40)), table) <= 1.05 * lowest_cost(table, 40)


def test_throughput_routes_are_spread() -> None:
    table = [server("a", 0, 4), server("b", 0, 4), server("slow", 0, 4, speed=1.0)]
    rng = random.Random(0)
    drawn = [find_throughput_route(table, needs(0, 4), rng.random)[0].peer_id for _ in range(300)]
    assert min(drawn.count("a"), drawn.count("b")) > 100
    assert drawn.count("slow") < 20


def test_a_throughput_route_covers_the_blocks() -> None:
    rng = random.Random(1)
    table = crowd(rng, 200, 30, longest=20)
    assert_covers(find_throughput_route(table, needs(5, 25), rng.random), 5, 25)
