import random

import pytest

from petals.client.routing.route import (
    Candidate,
    Needs,
    find_route,
    find_throughput_route,
    missing_blocks,
)
from petals.errors import MissingBlocksError, NoCapacity, TrainingRefused
from petals.types import BlockSpan, Hop, PeerId, Route


def server(
    name: str, start: int, end: int, *, speed: float = 0.01, **costs: float | int
) -> Candidate:
    return Candidate(
        peer_id=PeerId(name), blocks=BlockSpan(start, end), seconds_per_block=speed, **costs
    )


def needs(start: int, end: int, **options: object) -> Needs:
    return Needs(blocks=BlockSpan(start, end), **options)


def hops(*parts: tuple[str, int, int]) -> Route:
    return tuple(Hop(PeerId(name), BlockSpan(start, end)) for name, start, end in parts)


def test_spans_in_a_row() -> None:
    table = [server("c", 20, 30), server("a", 0, 10), server("b", 10, 20)]
    assert find_route(table, needs(0, 30)) == hops(("a", 0, 10), ("b", 10, 20), ("c", 20, 30))


def test_a_part_of_a_span_is_enough() -> None:
    table = [server("a", 0, 10), server("b", 10, 20)]
    assert find_route(table, needs(3, 12)) == hops(("a", 3, 10), ("b", 10, 12))


def test_one_server_rather_than_two_equally_fast_ones() -> None:
    table = [server("a", 0, 5), server("b", 5, 10), server("all", 0, 10)]
    assert find_route(table, needs(0, 10)) == hops(("all", 0, 10))


def test_overlap_is_cut_where_the_faster_one_begins() -> None:
    table = [
        server("slow", 0, 8, speed=0.05, round_trip_seconds=0.001),
        server("fast", 4, 12, speed=0.001, round_trip_seconds=0.001),
    ]
    assert find_route(table, needs(0, 12)) == hops(("slow", 0, 4), ("fast", 4, 12))


def test_a_near_server_beats_a_fast_one_far_away() -> None:
    near = server("near", 0, 4, speed=0.01, round_trip_seconds=0.002)
    far = server("far", 0, 4, speed=0.001, round_trip_seconds=0.2)
    assert find_route([near, far], needs(0, 4))[0].peer_id == "near"


def test_a_long_queue_sends_us_elsewhere() -> None:
    table = [server("busy", 0, 4, queue_seconds=0.5), server("idle", 0, 4, speed=0.02)]
    assert find_route(table, needs(0, 4))[0].peer_id == "idle"


def test_little_room_is_the_last_resort() -> None:
    table = [server("small", 0, 4, tokens_free=100), server("slow", 0, 4, speed=0.5)]
    assert find_route(table, needs(0, 4, cache_tokens=20))[0].peer_id == "small"
    assert find_route(table, needs(0, 4, cache_tokens=30))[0].peer_id == "slow"
    assert find_route(table[:1], needs(0, 4, cache_tokens=30))[0].peer_id == "small"


def test_one_that_keeps_outputs_rather_than_one_that_cannot() -> None:
    full = server("full", 0, 4, outbox_tokens_free=99)
    roomy = server("roomy", 0, 4, speed=0.015, outbox_tokens_free=100)
    slow = server("slow", 0, 4, speed=0.1, outbox_tokens_free=100)
    assert find_route([full, roomy], needs(0, 4, cache_tokens=100))[0].peer_id == "roomy"
    assert find_route([full, slow], needs(0, 4, cache_tokens=100))[0].peer_id == "full"


def test_training_needs_servers_that_train() -> None:
    table = [server("a", 0, 4, speed=0.5), server("b", 0, 4, trains=False)]
    assert find_route(table, needs(0, 4))[0].peer_id == "b"
    assert find_route(table, needs(0, 4, is_training=True))[0].peer_id == "a"
    with pytest.raises(TrainingRefused, match="0:4"):
        find_route(table[1:], needs(0, 4, is_training=True))
    with pytest.raises(MissingBlocksError, match="4:5"):
        find_route(table, needs(0, 5, is_training=True))


def test_missing_blocks_are_named() -> None:
    table = [server("a", 0, 10), server("b", 20, 25), server("c", 26, 30)]
    with pytest.raises(MissingBlocksError, match="10:20, 25:26 of tiny") as caught:
        find_route(table, needs(0, 30, model="tiny"))
    assert "petals serve tiny --blocks 10:20" in caught.value.hint
    with pytest.raises(MissingBlocksError, match="0:30"):
        find_route([], needs(0, 30))


def test_the_avoided_are_used_only_where_nobody_else_is() -> None:
    table = [server("bad", 0, 4, speed=0.001), server("good", 0, 4), server("only", 4, 8)]
    avoid = frozenset({PeerId("bad")})
    assert find_route(table, needs(0, 8, avoid=avoid))[0].peer_id == "good"
    both = frozenset({PeerId("bad"), PeerId("only")})
    assert [hop.peer_id for hop in find_route(table, needs(0, 8, avoid=both))][-1] == "only"


def test_refusals_by_every_holder_are_no_capacity() -> None:
    table = [server("a", 0, 4), server("b", 4, 8)]
    with pytest.raises(NoCapacity, match="4:8"):
        find_route(table, needs(0, 8, exclude=frozenset({PeerId("b")})))


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


def cost(route: Route, table: dict[str, Candidate]) -> float:
    total = 0.0
    for hop in route:
        one = table[hop.peer_id]
        total += 0.002 + one.queue_seconds + one.round_trip_seconds
        total += len(hop.blocks) * one.seconds_per_block
    return total


def cheapest(table: dict[str, Candidate], start: int, end: int) -> float:
    """By trying every cut and every server."""
    if start == end:
        return 0.0
    best = float("inf")
    for name, one in table.items():
        for cut in range(start + 1, end + 1):
            if one.blocks.covers(BlockSpan(start, cut)):
                leg = cost((Hop(PeerId(name), BlockSpan(start, cut)),), table)
                best = min(best, leg + cheapest(table, cut, end))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    table = {"first": server("first", 0, 4, round_trip_seconds=0.1, speed=0.1)}
    table["last"] = server("last", 4, 7, round_trip_seconds=0.1, speed=0.1)
    for number in range(5):
        start = rng.randrange(6)
        end = rng.randrange(start + 1, 8)
        table[str(number)] = server(
            str(number),
            start,
            min(end, 7),
            speed=rng.uniform(0.001, 0.05),
            queue_seconds=rng.uniform(0, 0.05),
            round_trip_seconds=rng.uniform(0, 0.1),
        )
    route = find_route(list(table.values()), needs(0, 7))
    assert route[0].blocks.start == 0
    assert route[-1].blocks.end == 7
    assert all(a.blocks.end == b.blocks.start for a, b in zip(route, route[1:], strict=False))
    assert all(table[hop.peer_id].blocks.covers(hop.blocks) for hop in route)
    assert cost(route, table) == pytest.approx(cheapest(table, 0, 7))


def crowd(num_servers: int, num_blocks: int) -> list[Candidate]:
    rng = random.Random(7)
    table = []
    for number in range(num_servers):
        start = rng.randrange(num_blocks)
        table.append(
            server(
                f"p{number}",
                start,
                min(num_blocks, start + rng.randint(1, 20)),
                speed=rng.uniform(0.001, 0.05),
                queue_seconds=rng.uniform(0, 0.05),
                round_trip_seconds=rng.uniform(0.01, 0.3),
            )
        )
    return table


def test_pruning_costs_little() -> None:
    """The pruned search in a crowd is within a few per cent of the whole one."""
    table = crowd(600, 40)
    by_name = {one.peer_id: one for one in table}
    pruned = cost(find_route(table, needs(0, 40)), by_name)
    best = {40: 0.0}
    for start in range(39, -1, -1):
        best[start] = min(
            cost((Hop(one.peer_id, BlockSpan(start, cut)),), by_name) + best[cut]
            for one in table
            if start in one.blocks
            for cut in range(start + 1, one.blocks.end + 1)
        )
    assert pruned <= 1.05 * best[0]


def test_throughput_routes_are_spread() -> None:
    table = [server("a", 0, 4), server("b", 0, 4), server("slow", 0, 4, speed=1.0)]
    rng = random.Random(0)
    drawn = [find_throughput_route(table, needs(0, 4), rng.random)[0].peer_id for _ in range(300)]
    assert drawn.count("a") > 100
    assert drawn.count("b") > 100
    assert drawn.count("slow") < 20


def test_throughput_route_covers_the_blocks() -> None:
    table = crowd(200, 30) + [server("all", 0, 30)]
    route = find_throughput_route(table, needs(5, 25), random.Random(1).random)
    assert (route[0].blocks.start, route[-1].blocks.end) == (5, 25)
    assert all(a.blocks.end == b.blocks.start for a, b in zip(route, route[1:], strict=False))
