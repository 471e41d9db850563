from dataclasses import replace
from types import MappingProxyType

import pytest

from petals.server.lifecycle.placement import coverage_of
from petals.server.lifecycle.rebalancing import (
    Move,
    MoveReason,
    MoverState,
    begin,
    draw,
    find_move,
    may_leave,
    should_move,
)
from petals.server.policies import MovePolicy
from petals.swarm.directory.records import ServerRecord, View
from petals.types import BlockSpan, ModelId, PeerId, ServerState

ONLINE, JOINING, DRAINING = ServerState.ONLINE, ServerState.JOINING, ServerState.DRAINING
GAP, LOAD = MoveReason.GAP, MoveReason.LOAD
POLICY = MovePolicy()
LONG_AGO = MoverState(since=-1e6, next_look=0.0)


def view_of(*servers: tuple[str, int, int, ServerState, float]) -> View:
    """Servers as (name, start, end, state, tokens per second for each of its blocks)."""
    records = {
        PeerId(name): ServerRecord(
            peer_id=name,
            model="m",
            num_blocks=6,
            spans=((start, end),),
            state=state,
            expires_at=1.0,
            throughput=share * (end - start),
        )
        for name, start, end, state, share in servers
    }
    return View(ModelId("m"), 6, MappingProxyType(records), 0.0)


def move_of(name: str, view: View) -> BlockSpan | None:
    move = find_move(coverage_of(view), view.records[PeerId(name)], POLICY)
    return None if move is None else move.blocks


CROWDED = view_of(
    ("a", 0, 3, ONLINE, 4.0),
    ("b", 0, 3, ONLINE, 4.0),
    ("c", 0, 3, ONLINE, 4.0),
    ("d", 3, 6, ONLINE, 1.0),
)
BALANCED = view_of(("a", 0, 3, ONLINE, 4.0), ("b", 0, 3, ONLINE, 4.0), ("d", 3, 6, ONLINE, 7.0))
EVEN = view_of(("a", 0, 3, ONLINE, 4.0), ("b", 0, 3, ONLINE, 4.0), ("d", 3, 6, ONLINE, 4.0))
HOLE = view_of(("a", 0, 3, ONLINE, 4.0), ("b", 0, 3, ONLINE, 4.0))
HELD_BY_ONE = view_of(("a", 0, 3, ONLINE, 4.0))
SPARE_IS_JOINING = view_of(("a", 0, 3, ONLINE, 4.0), ("b", 0, 3, JOINING, 4.0))
SPARE_IS_DRAINING = view_of(("a", 0, 3, ONLINE, 4.0), ("b", 0, 3, DRAINING, 4.0))
TWO_ARE_JOINING = view_of(
    ("a", 0, 3, ONLINE, 4.0),
    ("b", 0, 3, ONLINE, 4.0),
    ("c", 0, 3, ONLINE, 4.0),
    ("d", 3, 6, ONLINE, 1.0),
    ("e", 3, 6, JOINING, 6.0),
    ("f", 3, 6, JOINING, 6.0),
)


@pytest.mark.parametrize(
    ("name", "view", "wanted"),
    [
        ("a", CROWDED, BlockSpan(3, 6)),
        ("d", CROWDED, None),
        ("a", BALANCED, None),
        ("d", BALANCED, None),
        ("b", HOLE, BlockSpan(3, 6)),
        ("a", HELD_BY_ONE, None),
        ("a", SPARE_IS_JOINING, None),
        ("b", SPARE_IS_JOINING, None),
        ("a", SPARE_IS_DRAINING, None),
        ("b", SPARE_IS_DRAINING, None),
        ("a", TWO_ARE_JOINING, None),
        # A gain below the margin: leaving would swap which half is the weaker one.
        ("a", EVEN, None),
        ("b", EVEN, None),
    ],
)
def test_who_would_help_by_moving(name: str, view: View, wanted: BlockSpan | None) -> None:
    assert move_of(name, view) == wanted


def test_many_small_servers_move_although_no_single_one_lifts_the_bottleneck_much() -> None:
    crowd = [(f"s{i:02}", 0, 3, ONLINE, 1.0) for i in range(40)]
    view = view_of(*crowd, *[(f"t{i:02}", 3, 6, ONLINE, 1.0) for i in range(20)])
    for name, num_better in (("s00", 0), ("s07", 7), ("s39", 39)):
        move = find_move(coverage_of(view), view.records[PeerId(name)], POLICY)
        assert move == Move(BlockSpan(3, 6), num_better)


def test_the_best_move_comes_first() -> None:
    """Without the next in size the left half would rest on its largest server alone."""
    view = view_of(
        ("a", 0, 3, ONLINE, 9.0),
        ("b", 0, 3, ONLINE, 3.0),
        ("c", 0, 3, ONLINE, 4.0),
        ("d", 3, 6, ONLINE, 2.0),
        ("e", 3, 6, ONLINE, 2.0),
    )
    coverage = coverage_of(view)
    moves = {name: find_move(coverage, view.records[PeerId(name)], POLICY) for name in "abcde"}
    first = [name for name, move in moves.items() if move is not None and not move.num_better]
    assert first == ["b"] and moves["d"] is moves["e"] is None


def test_a_swarm_that_can_carry_enough_is_left_alone_however_uneven_its_shares() -> None:
    """The wide server gives its passes where the others are not."""
    view = view_of(("w", 0, 6, ONLINE, 4.0), ("v", 0, 6, ONLINE, 4.0), ("a", 0, 3, ONLINE, 6.0))
    coverage = coverage_of(view)
    assert coverage.served.min() / coverage.level < 0.75 and coverage.carried > 0.95
    assert [move_of(name, view) for name in "wva"] == [None] * 3


def until_decided(view: View, me: str, state: MoverState) -> tuple[list[float], BlockSpan | None]:
    """Look whenever it is time, at most 100 times: when it was time, and the span in the end."""
    times: list[float] = []
    for _ in range(100):
        now = state.next_look
        times.append(now)
        state, blocks = should_move(view, PeerId(me), now, state)
        assert state.next_look > now
        if blocks is not None:
            return times, blocks
    return times, None


def test_a_reason_that_holds_twice_moves() -> None:
    times, blocks = until_decided(CROWDED, "a", LONG_AGO)
    assert blocks == BlockSpan(3, 6)
    assert len(times) >= 2 and times[-1] - times[0] >= POLICY.confirm_seconds / 2


def test_a_reason_that_is_gone_when_looked_at_again_does_not() -> None:
    confirming = MoverState(since=-1e6, next_look=0.0, num_looks=3, confirming=LOAD)
    assert should_move(CROWDED, PeerId("a"), 0.0, confirming)[1] == BlockSpan(3, 6)
    state, blocks = should_move(TWO_ARE_JOINING, PeerId("a"), 0.0, confirming)
    assert blocks is None and state.confirming is None


def test_nothing_is_decided_before_its_time_or_without_a_record() -> None:
    early = MoverState(since=-1e6, next_look=10.0, confirming=LOAD)
    assert should_move(CROWDED, PeerId("a"), 9.9, early) == (early, None)
    assert should_move(CROWDED, PeerId("stranger"), 11.0, early) == (early, None)


def test_a_server_that_has_just_come_stays_unless_a_block_has_no_server() -> None:
    new = MoverState(since=0.0, next_look=10.0, confirming=LOAD)
    assert should_move(CROWDED, PeerId("a"), 10.0, new)[1] is None
    assert should_move(CROWDED, PeerId("a"), POLICY.min_stay_seconds, new)[1] is not None
    filling = replace(new, confirming=GAP)
    assert should_move(HOLE, PeerId("a"), 10.0, filling)[1] == BlockSpan(3, 6)


def test_a_balanced_swarm_never_moves() -> None:
    times, blocks = until_decided(BALANCED, "a", LONG_AGO)
    assert blocks is None and len(times) == 100


def test_in_a_large_crowd_few_start_at_once() -> None:
    crowd = [(f"s{i:03}", 0, 3, ONLINE, 1.0) for i in range(120)]
    hole = view_of(*crowd)
    started = [
        should_move(hole, PeerId(name), 0.0, LONG_AGO)[0].confirming is GAP for name, *_ in crowd
    ]
    assert 5 < sum(started) < 40


def test_they_look_again_one_after_another_and_then_the_hole_is_filled() -> None:
    """Servers with a later turn see which others are on the way, and stay once these suffice."""
    servers = {PeerId(f"s{i:03}"): (0, 3) for i in range(40)}
    states = dict.fromkeys(servers, LONG_AGO)
    draining: set[PeerId] = set()
    for now in range(0, 1200, 20):
        records = {
            peer: ServerRecord(
                peer_id=peer,
                model="m",
                num_blocks=6,
                spans=((0, 3),),
                state=DRAINING if peer in draining else ONLINE,
                next_spans=(span,) if peer in draining else (),
                expires_at=1.0,
                throughput=3.0,
            )
            for peer, span in servers.items()
        }
        view = View(ModelId("m"), 6, MappingProxyType(records), 0.0)
        for peer in servers:
            states[peer], blocks = should_move(view, peer, float(now), states[peer])
            if blocks is not None:
                servers[peer] = (blocks.start, blocks.end)
                draining.add(peer)
    assert 17 <= len(draining) <= 20


def test_looks_are_spread_and_rarer_in_large_swarms() -> None:
    first = [begin(PeerId(f"p{i}"), 100.0, 10_000).load_due - 100.0 for i in range(200)]
    period = 10_000 * POLICY.seconds_between_looks
    assert 0 <= min(first) < period / 10 and period * 0.9 < max(first) <= period
    few = [begin(PeerId(f"p{i}"), 0.0, 3) for i in range(50)]
    assert max(state.load_due for state in few) <= POLICY.look_seconds
    assert max(state.next_look for state in few) <= POLICY.gap_seconds


@pytest.mark.parametrize("look_seconds", [1.0, 60.0, 3600.0])
def test_a_gap_is_filled_within_seconds_whatever_the_period(look_seconds: float) -> None:
    policy = MovePolicy(look_seconds=look_seconds)
    for name in "ab":
        state = begin(PeerId(name), 0.0, 2, policy)
        while state.next_look < 50.0:  # some looks while nothing is wrong
            state, blocks = should_move(EVEN, PeerId(name), state.next_look, state, policy)
            assert blocks is None
        began, blocks = state.next_look, None
        while blocks is None:
            now = state.next_look
            state, blocks = should_move(HOLE, PeerId(name), now, state, policy)
        assert blocks == BlockSpan(3, 6)
        assert now - began <= 3 * POLICY.gap_seconds


@pytest.mark.parametrize("look_seconds", [2.0, 600.0])
def test_a_load_is_confirmed_within_the_period_of_looks(look_seconds: float) -> None:
    policy = MovePolicy(look_seconds=look_seconds, seconds_between_looks=0.0)
    state, blocks = should_move(CROWDED, PeerId("a"), 0.0, LONG_AGO, policy)
    assert blocks is None and state.confirming is LOAD
    assert state.load_due <= 1.1 * min(look_seconds, policy.confirm_seconds)


def test_a_gap_does_not_wait_for_a_load_that_is_being_confirmed() -> None:
    state, _ = should_move(CROWDED, PeerId("a"), 0.0, LONG_AGO)
    assert state.confirming is LOAD
    now = state.next_look
    state, blocks = should_move(HOLE, PeerId("a"), now, state)
    assert blocks is None and state.confirming is GAP
    # The turn of a gap is kept: an earlier look changes nothing.
    early = replace(state, next_look=now)
    assert should_move(HOLE, PeerId("a"), now + 0.1, early)[0].load_due == state.load_due
    state, blocks = should_move(HOLE, PeerId("a"), state.next_look, state)
    assert blocks == BlockSpan(3, 6) and state.next_look - now < 4 * POLICY.gap_seconds


def test_draws_are_even_and_independent_of_each_other() -> None:
    drawn = [draw(PeerId("p"), i, "pause") for i in range(1000)]
    assert 0.45 < sum(drawn) / 1000 < 0.55 and min(drawn) >= 0 and max(drawn) < 1
    assert draw(PeerId("p"), 1, "pause") != draw(PeerId("p"), 1, "turn")
    assert draw(PeerId("p"), 1, "pause") != draw(PeerId("q"), 1, "pause")


@pytest.mark.parametrize(
    ("other", "may"),
    [
        (("b", 0, 3, ONLINE, 1.0), True),
        (("b", 0, 2, ONLINE, 1.0), False),
        (("b", 0, 3, JOINING, 1.0), False),
        (("b", 0, 3, DRAINING, 1.0), False),
    ],
)
def test_no_server_leaves_a_block_uncovered(
    other: tuple[str, int, int, ServerState, float], may: bool
) -> None:
    view = view_of(("a", 0, 3, DRAINING, 1.0), other)
    assert may_leave(view, PeerId("a")) is may


def test_of_two_that_drain_at_once_neither_leaves() -> None:
    view = view_of(("a", 0, 3, DRAINING, 1.0), ("b", 0, 3, DRAINING, 1.0))
    assert not may_leave(view, PeerId("a")) and not may_leave(view, PeerId("b"))
