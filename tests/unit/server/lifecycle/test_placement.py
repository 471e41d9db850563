from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import ConfigError
from petals.server.lifecycle.placement import (
    best_moves_of,
    carried_by,
    choose_blocks,
    coverage_of,
    must_yield,
)
from petals.swarm.directory.records import ServerRecord, View
from petals.types import BlockSpan, ModelId, PeerId, ServerState

ONLINE, JOINING = ServerState.ONLINE, ServerState.JOINING


def view_of(*servers: tuple[str, int, int, ServerState, float]) -> View:
    records = {
        PeerId(name): ServerRecord(
            peer_id=name,
            model="m",
            num_blocks=10,
            spans=((start, end),),
            state=state,
            expires_at=1.0,
            throughput=throughput,
        )
        for name, start, end, state, throughput in servers
    }
    return View(ModelId("m"), 10, MappingProxyType(records), 0.0)


def placed(*servers: tuple[int, float]) -> list[BlockSpan]:
    """Servers of (number of blocks, throughput) that come one by one."""
    spans: list[BlockSpan] = []
    for num_blocks, throughput in servers:
        entries = [
            (str(i), *span, ONLINE, rate)
            for i, (span, (_, rate)) in enumerate(
                zip([(s.start, s.end) for s in spans], servers, strict=False)
            )
        ]
        spans.append(choose_blocks(coverage_of(view_of(*entries)), num_blocks, throughput))
    return spans


def test_an_empty_swarm_is_filled_from_the_front() -> None:
    spans = placed((4, 4.0), (4, 4.0), (4, 4.0), (4, 4.0))
    assert spans[:3] == [BlockSpan(0, 4), BlockSpan(4, 8), BlockSpan(6, 10)]
    # Blocks 6:8 have two holders; the others are to get their second.
    assert spans[3] in (BlockSpan(0, 4), BlockSpan(2, 6))


def test_more_than_there_is_means_all() -> None:
    assert placed((17, 4.0)) == [BlockSpan(0, 10)]


def test_no_blocks_no_choice() -> None:
    with pytest.raises(ConfigError):
        choose_blocks(coverage_of(View(ModelId("m"), 0, MappingProxyType({}), 0.0)), 3)
    with pytest.raises(ConfigError):
        choose_blocks(coverage_of(view_of()), 0)


def test_the_weakest_blocks_count_not_the_sum() -> None:
    view = view_of(
        *[(f"a{i}", 0, 2, ONLINE, 4.0) for i in range(4)],
        *[(f"b{i}", 2, 3, ONLINE, 1.0) for i in range(2)],
        *[(f"c{i}", 3, 10, ONLINE, 21.0) for i in range(2)],
    )
    assert choose_blocks(coverage_of(view), 2) in (BlockSpan(1, 3), BlockSpan(2, 4))


spans_and_rates = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 10), st.floats(1.0, 100.0)), max_size=8
)


@given(spans_and_rates, st.integers(1, 10))
def test_no_other_window_lowers_the_need_more(
    servers: list[tuple[int, int, float]], num_blocks: int
) -> None:
    entries = [(str(i), a, min(10, a + n), ONLINE, r) for i, (a, n, r) in enumerate(servers)]
    coverage = coverage_of(view_of(*entries))
    chosen = choose_blocks(coverage, num_blocks, 10.0)
    assert len(chosen) == num_blocks

    def mean_need(start: int) -> float:
        new = ("new", start, start + num_blocks, ONLINE, 10.0)
        return coverage_of(view_of(*entries, new)).mean_need

    needs = [mean_need(start) for start in range(11 - num_blocks)]
    assert needs[chosen.start] <= min(needs) * (1 + 1e-6)


def test_servers_that_come_or_stay_count_and_those_that_go_do_not() -> None:
    view = view_of(
        ("a", 0, 4, ONLINE, 8.0),
        ("b", 2, 6, JOINING, 4.0),
        ("c", 5, 10, ServerState.DRAINING, 10.0),
        ("me", 0, 10, JOINING, 50.0),
    )
    coverage = coverage_of(view, without=(PeerId("me"),))
    assert coverage.served.tolist() == [2, 2, 3, 3, 1, 1, 0, 0, 0, 0]
    assert coverage.num_online.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert {record.peer_id for record in coverage.servers} == {"a", "b"}


def test_an_unmeasured_server_counts_as_a_typical_one() -> None:
    view = view_of(("a", 0, 2, ONLINE, 8.0), ("b", 0, 2, ONLINE, 12.0), ("c", 4, 9, JOINING, 0.0))
    assert coverage_of(view).served[4:9].tolist() == [2.0] * 5
    alone = coverage_of(view_of(("c", 0, 10, JOINING, 0.0)))
    assert alone.served.min() > 0


def test_a_block_with_two_servers_is_worth_more_than_one_with_one_as_fast_as_both() -> None:
    view = view_of(
        ("fast", 0, 5, ONLINE, 20.0), ("slow", 5, 10, ONLINE, 10.0), ("other", 5, 10, ONLINE, 10.0)
    )
    coverage = coverage_of(view)
    assert 0 < coverage.dependable[0] < coverage.dependable[9]
    assert choose_blocks(coverage, 5) == BlockSpan(0, 5)


def test_who_moves_counts_where_it_will_be() -> None:
    view = view_of(("a", 0, 4, ServerState.DRAINING, 8.0), ("b", 0, 4, ONLINE, 4.0))
    going = msgspec.structs.replace(view.records[PeerId("a")], next_spans=((6, 10),))
    records = MappingProxyType({**view.records, PeerId("a"): going})
    coverage = coverage_of(View(view.model, view.num_blocks, records, 0.0))
    assert coverage.served.tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 2, 2]
    assert coverage.num_online.tolist() == [1] * 4 + [0] * 6
    assert coverage_of(view).served.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_an_empty_view_has_a_coverage() -> None:
    coverage = coverage_of(view_of())
    assert coverage.level == coverage.carried == 0.0
    assert choose_blocks(coverage, 3) == BlockSpan(0, 3)


def test_what_is_carried_is_what_clients_can_use_not_what_even_shares_give() -> None:
    """The one that holds all gives its passes where the other is not."""
    both = [((((0, 10),)), 10.0), ((((0, 5),)), 10.0)]
    assert carried_by(both, 10) == pytest.approx(1.0, abs=0.02)
    apart = [(((0, 5),), 10.0), (((5, 10),), 10.0)]
    assert carried_by(apart, 10) == pytest.approx(1.0)
    uneven = [(((0, 5),), 10.0), (((5, 10),), 5.0)]
    assert 0.66 < carried_by(uneven, 10) < 0.75
    assert carried_by([(((0, 9),), 10.0)], 10) < 0.1


def test_an_offer_is_the_best_move_of_a_server_and_what_it_gains() -> None:
    view = view_of(
        *[(f"a{i}", 0, 5, ONLINE, 10.0) for i in range(4)],
        ("b", 5, 10, ONLINE, 10.0),
        ("c", 5, 10, ONLINE, 10.0),
    )
    coverage = coverage_of(view)
    best = best_moves_of(coverage, coverage.servers)
    assert best.starts[:4].tolist() == [5] * 4
    assert (best.gains[:4] > 0.3).all() and (best.gains[4:] <= 0).all()
    assert best.parts == pytest.approx([1 / 6] * 6)
    moved = coverage_of(
        view_of(
            *[(f"a{i}", 0, 5, ONLINE, 10.0) for i in range(3)],
            *[(f"b{i}", 5, 10, ONLINE, 10.0) for i in range(3)],
        )
    )
    gain = (coverage.mean_need / moved.mean_need) ** (1 / 8) - 1
    assert best.gains[0] == pytest.approx(gain)


def test_of_two_that_join_at_once_the_smaller_id_stays() -> None:
    view = view_of(("a", 0, 4, JOINING, 0.0), ("b", 2, 6, JOINING, 0.0))
    assert must_yield(view, BlockSpan(2, 6), PeerId("b"))
    assert not must_yield(view, BlockSpan(0, 4), PeerId("a"))
    assert not must_yield(view, BlockSpan(4, 8), PeerId("b"))
    online = view_of(("a", 0, 4, ONLINE, 1.0))
    assert not must_yield(online, BlockSpan(0, 4), PeerId("b"))
