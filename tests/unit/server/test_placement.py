from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import ConfigError
from petals.server.placement import choose_span, must_yield, throughput_by_block
from petals.swarm.records import ServerRecord, View
from petals.types import BlockSpan, ModelId, PeerId, ServerState


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
def test_a_span_is_inside_the_model_and_holds_the_weakest_block(
    served: list[int], num_blocks: int
) -> None:
    span = choose_span(served, num_blocks)
    assert len(span) == min(num_blocks, len(served))
    assert span.start >= 0 and span.end <= len(served)
    assert min(served[span.start : span.end]) == min(served)


def test_servers_that_come_or_stay_count_and_those_that_go_do_not() -> None:
    view = view_of(
        ("a", 0, 4, ServerState.ONLINE, 7.0),
        ("b", 2, 6, ServerState.JOINING, 0.0),
        ("c", 5, 10, ServerState.DRAINING, 9.0),
        ("me", 0, 10, ServerState.JOINING, 5.0),
    )
    served = throughput_by_block(view, without=(PeerId("me"),))
    assert served == (7.0, 7.0, 8.0, 8.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def test_of_two_that_join_at_once_the_smaller_id_stays() -> None:
    view = view_of(("a", 0, 4, ServerState.JOINING, 0.0), ("b", 2, 6, ServerState.JOINING, 0.0))
    assert must_yield(view, BlockSpan(2, 6), PeerId("b"))
    assert not must_yield(view, BlockSpan(0, 4), PeerId("a"))
    assert not must_yield(view, BlockSpan(4, 8), PeerId("b"))
    online = view_of(("a", 0, 4, ServerState.ONLINE, 1.0))
    assert not must_yield(online, BlockSpan(0, 4), PeerId("b"))
