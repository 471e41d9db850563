from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import ConfigError
from petals.server.placement import choose_span, must_yield, picture_of, throughput_by_block
from petals.swarm.records import ServerRecord, View
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


def test_an_empty_swarm_is_filled_from_the_front() -> None:
    served = [0.0] * 10
    spans = []
    for _ in range(4):
        span = choose_span(served, 4)
        spans.append(span)
        for block in range(span.start, span.end):
            served[block] += 1.0
    assert spans[:2] == [BlockSpan(0, 4), BlockSpan(4, 8)]
    assert min(served) >= 1.0
    assert spans[2] == BlockSpan(6, 10)


def test_the_weakest_blocks_count_not_the_sum() -> None:
    assert choose_span([9, 9, 1, 9, 5, 5], 2) in (BlockSpan(1, 3), BlockSpan(2, 4))
    assert choose_span([2, 2, 2, 1, 9, 9], 3) == BlockSpan(1, 4)


def test_more_than_there_is_means_all() -> None:
    assert choose_span([1, 0, 1], 7) == BlockSpan(0, 3)


def test_no_blocks_no_choice() -> None:
    with pytest.raises(ConfigError):
        choose_span([], 3)
    with pytest.raises(ConfigError):
        choose_span([1.0], 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 30))
def test_no_window_is_weaker_than_the_one_chosen(served: list[int], num_blocks: int) -> None:
    span = choose_span(served, num_blocks)
    length = min(num_blocks, len(served))
    windows = [sorted(served[i : i + length]) for i in range(len(served) - length + 1)]
    assert sorted(served[span.start : span.end]) == min(windows)
    assert windows.index(min(windows)) == span.start and len(span) == length


def test_servers_that_come_or_stay_count_and_those_that_go_do_not() -> None:
    view = view_of(
        ("a", 0, 4, ONLINE, 8.0),
        ("b", 2, 6, JOINING, 4.0),
        ("c", 5, 10, ServerState.DRAINING, 10.0),
        ("me", 0, 10, JOINING, 50.0),
    )
    picture = picture_of(view, without=(PeerId("me"),))
    assert picture.served.tolist() == [2, 2, 3, 3, 1, 1, 0, 0, 0, 0]
    assert picture.num_online.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert picture.num_servers == 2


def test_an_unmeasured_server_counts_as_a_typical_one() -> None:
    view = view_of(("a", 0, 2, ONLINE, 8.0), ("b", 0, 2, ONLINE, 12.0), ("c", 4, 9, JOINING, 0.0))
    assert picture_of(view).served[4:9].tolist() == [2.0] * 5
    alone = picture_of(view_of(("c", 0, 10, JOINING, 0.0)))
    assert alone.served.min() > 0


def test_a_block_with_two_servers_is_worth_more_than_one_with_one_as_fast_as_both() -> None:
    view = view_of(
        ("fast", 0, 5, ONLINE, 20.0), ("slow", 5, 10, ONLINE, 10.0), ("other", 5, 10, ONLINE, 10.0)
    )
    worth = throughput_by_block(view)
    assert 0 < worth[0] < worth[9]
    assert choose_span(worth, 5) == BlockSpan(0, 5)


def test_a_picture_without_a_server_is_the_picture_of_the_rest() -> None:
    view = view_of(("a", 0, 6, ONLINE, 6.0), ("b", 4, 10, ONLINE, 12.0), ("c", 4, 6, JOINING, 2.0))
    for name, record in view.records.items():
        derived, direct = picture_of(view).without(record), picture_of(view, without=(name,))
        assert derived.served == pytest.approx(direct.served)
        assert derived.strongest == pytest.approx(direct.strongest)
        assert derived.worth == pytest.approx(direct.worth)
        assert derived.num_online.tolist() == direct.num_online.tolist()


def test_an_empty_view_has_a_picture() -> None:
    picture = picture_of(view_of())
    assert picture.weakest == picture.level == 0.0
    assert choose_span(picture.worth, 3) == BlockSpan(0, 3)


def test_of_two_that_join_at_once_the_smaller_id_stays() -> None:
    view = view_of(("a", 0, 4, JOINING, 0.0), ("b", 2, 6, JOINING, 0.0))
    assert must_yield(view, BlockSpan(2, 6), PeerId("b"))
    assert not must_yield(view, BlockSpan(0, 4), PeerId("a"))
    assert not must_yield(view, BlockSpan(4, 8), PeerId("b"))
    online = view_of(("a", 0, 4, ONLINE, 1.0))
    assert not must_yield(online, BlockSpan(0, 4), PeerId("b"))
