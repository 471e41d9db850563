"""Where a route is cut."""

from petals.client.routing.direct_links import DirectLinks
from petals.types import PeerId

A, B, C, D = (PeerId(name) for name in "ABCD")


def arcs(edges: DirectLinks, route: list[PeerId], now: float) -> list[list[PeerId]]:
    found, at = [], 0
    while at < len(route):
        end = edges.run_end(route, at, now)
        found.append(route[at:end])
        at = end
    return found


def test_everything_is_direct_until_it_fails() -> None:
    assert arcs(DirectLinks(30.0), [A, B, C, D], 0.0) == [[A, B, C, D]]


def test_a_closed_edge_cuts_one_way_only() -> None:
    edges = DirectLinks(30.0)
    edges.close(B, C, now=5.0)
    assert arcs(edges, [A, B, C, D], 5.0) == [[A, B], [C, D]]
    assert arcs(edges, [A, C, B, D], 5.0) == [[A, C, B, D]]


def test_a_closed_edge_is_tried_again() -> None:
    edges = DirectLinks(30.0)
    edges.close(A, B, now=5.0)
    assert arcs(edges, [A, B], 34.9) == [[A], [B]]
    assert arcs(edges, [A, B], 35.0) == [[A, B]]


def test_what_came_last_tells_the_way() -> None:
    edges = DirectLinks(30.0)
    assert not edges.is_relayed(A, B)
    edges.note_way(A, B, is_relayed=True)
    assert edges.is_relayed(A, B) and not edges.is_relayed(B, A)
    edges.note_way(A, B, is_relayed=False)
    assert not edges.is_relayed(A, B)


def test_nobody_hands_over_to_himself() -> None:
    assert arcs(DirectLinks(30.0), [A, A, B], 0.0) == [[A], [A, B]]
