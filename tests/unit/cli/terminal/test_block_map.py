"""The picture of a swarm says who serves what and where it is thinnest."""

from types import MappingProxyType

import pytest

from petals.cli.terminal.block_map import MAP_WIDTH, block_map, draw_map
from petals.swarm.directory.records import ServerRecord, View
from petals.types import ModelId, PeerId, ServerState


def record(peer: str, *spans: tuple[int, int], num_blocks: int = 10, **more) -> ServerRecord:
    more.setdefault("state", ServerState.ONLINE)
    return ServerRecord(
        peer_id=peer, model="m", num_blocks=num_blocks, spans=spans, expires_at=100.0, **more
    )


def view(*records: ServerRecord, num_blocks: int = 10) -> View:
    by_peer = MappingProxyType({PeerId(each.peer_id): each for each in records})
    return View(ModelId("m"), num_blocks, by_peer, 50.0)


def test_names_the_servers_of_every_block() -> None:
    found = block_map(view(record("alpha", (0, 6)), record("bravo", (4, 10))))
    assert found["complete"] and found["missing"] == []
    assert found["coverage"] == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    assert found["blocks"][3]["servers"] == ["alpha"]
    assert found["blocks"][5]["servers"] == ["alpha", "bravo"]
    assert found["thinnest"] == {"num_servers": 1, "blocks": [0, 1, 2, 3, 6, 7, 8, 9]}


def test_a_gap_is_the_thinnest_place() -> None:
    found = block_map(view(record("alpha", (0, 3)), record("bravo", (7, 10))))
    assert not found["complete"] and found["missing"] == [[3, 7]]
    assert found["thinnest"] == {"num_servers": 0, "blocks": [3, 4, 5, 6]}


def test_a_joining_server_does_not_count_yet() -> None:
    found = block_map(view(record("alpha", (0, 10), state=ServerState.JOINING)))
    assert found["coverage"] == [0] * 10
    assert found["servers"][0]["state"] == "joining"


def test_draws_rows_counts_and_marks() -> None:
    servers = (record("peer-alpha", (0, 6), public_name="lab"), record("peer-bravo", (4, 10)))
    title, lab, bravo, counts, marks = draw_map(block_map(view(*servers)))
    assert title == "m: 10 blocks, 2 servers, complete"
    assert "lab …-alpha" in lab
    assert "██████····" in lab
    assert "····██████" in bravo
    assert counts.split() == ["servers", "1111221111"]
    assert marks.index("^") == counts.index("1111")
    assert "thinnest, 1 server: 8 blocks, first 0" in marks


@pytest.mark.parametrize(
    ("servers", "title", "marks"),
    [
        ([record("alpha", (1, 10))], "INCOMPLETE", "no server: block 0"),
        ([], "0 servers, INCOMPLETE", "no server: 10 blocks, first 0"),
    ],
)
def test_gaps_are_named(servers: list[ServerRecord], title: str, marks: str) -> None:
    lines = draw_map(block_map(view(*servers)))
    assert lines[0].endswith(title)
    assert marks in lines[-1]


def test_a_large_model_fits_the_terminal() -> None:
    servers = (record("alpha", (0, 126), num_blocks=126), record("bravo", (0, 60), num_blocks=126))
    lines = draw_map(block_map(view(*servers, num_blocks=126)))
    bars = [line.split()[1] for line in lines[1:3]]
    assert {len(bar) for bar in bars} == {42}
    assert len(bars[0]) <= MAP_WIDTH
    assert sum(bar.count("·") for bar in bars) == 22


def test_a_server_behind_a_relay_is_marked() -> None:
    lines = draw_map(block_map(view(record("alpha", (0, 10), relayed=True), record("b", (0, 10)))))
    assert [line.endswith("through a relay") for line in lines[1:3]] == [True, False]
