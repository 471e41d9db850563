"""Where a route is cut into direct runs."""

import pytest

from petals.client.routing.direct_links import DirectLinks
from petals.types import PeerId


@pytest.mark.parametrize(
    ("route", "closed", "now", "runs"),
    [
        ("ABCD", "", 5.0, ["ABCD"]),
        ("ABCD", "BC", 5.0, ["AB", "CD"]),
        ("ACBD", "BC", 5.0, ["ACBD"]),  # a link is directed
        ("AB", "AB", 34.9, ["A", "B"]),
        ("AB", "AB", 35.0, ["AB"]),  # a failed link is tried again after 30 s
        ("AAB", "", 5.0, ["A", "AB"]),  # a server does not forward to itself
    ],
)
def test_a_route_is_cut_at_failed_links(
    route: str, closed: str, now: float, runs: list[str]
) -> None:
    links, peers = DirectLinks(30.0), [PeerId(name) for name in route]
    if closed:
        links.close(*map(PeerId, closed), now=5.0)
    found = []
    while (start := sum(map(len, found))) < len(route):
        found.append(route[start : links.run_end(peers, start, now)])
    assert found == runs


def test_the_latest_states_decide_whether_a_link_is_relayed() -> None:
    links, near, far = DirectLinks(30.0), PeerId("A"), PeerId("B")
    assert not links.is_relayed(near, far)
    links.note_way(near, far, is_relayed=True)
    assert links.is_relayed(near, far) and not links.is_relayed(far, near)
    links.note_way(near, far, is_relayed=False)
    assert not links.is_relayed(near, far)
