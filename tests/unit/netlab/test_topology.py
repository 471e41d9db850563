"""What a laboratory is set to: addresses, paths and the forwarder's commands."""

import json

import pytest

from netlab.topology import (
    Changes,
    Host,
    Path,
    Topology,
    changed_path,
    commands,
    parse_rate,
    real_world,
)

HOME = Host("home", "us", up="20mbit", down="100mbit", access_ms=6, jitter_ms=3, loss=0.1)
LAB = Host("lab", "eu", access_ms=1, jitter_ms=4, nat="restricted")
TOPOLOGY = Topology((HOME, LAB, Host("other")), rtt_ms=20, regions={"eu": {"us": 90}})


@pytest.mark.parametrize(
    ("text", "rate"), [("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("0.5mbit", 5e5)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: parse_rate("fast"),
        lambda: Host("Upper"),
        lambda: Host("a", nat="open"),
        lambda: Host("a", up="100"),
        lambda: Host("a", loss=1.5),
        lambda: Path(rtt_ms=-1),
        lambda: Topology((Host("a"), Host("b"), Host("a"))),
        lambda: TOPOLOGY.ip("nobody"),
        lambda: commands(TOPOLOGY, Changes(paths={"home>lab": {"loss": 2}})),
    ],
)
def test_nonsense_is_refused(wrong) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_a_path_adds_up_regions_and_access_links() -> None:
    there, back = TOPOLOGY.path("home", "lab"), TOPOLOGY.path("lab", "home")
    assert there == back and not there.down
    assert (there.rtt_ms, there.jitter_ms, there.loss) == (97, 5, pytest.approx(0.1))
    assert TOPOLOGY.path("home", "other").rtt_ms == 26


def test_a_translated_host_has_two_addresses() -> None:
    assert TOPOLOGY.ip("home") == TOPOLOGY.own_ip("home") == "10.77.1.10"
    assert (TOPOLOGY.ip("lab"), TOPOLOGY.own_ip("lab")) == ("10.77.2.10", "192.168.2.2")


def test_commands_say_rates_queues_and_paths() -> None:
    lines = commands(TOPOLOGY, Changes())
    assert "rate 0 20000000 125000 100000000 625000" in lines
    assert "rate 1 0 16384 0 16384" in lines
    assert "path 0 1 48500000 5000000 0.100000000 0 0 0 0" in lines
    assert len([line for line in lines if line.startswith("path")]) == 6


def test_changes_apply_to_what_they_name() -> None:
    changes = Changes(
        hosts={"home": {"up": "1mbit", "access_ms": 100}},
        paths={"lab>home": {"down": True}},
        unplugged=["other"],
    )
    lines = commands(TOPOLOGY, changes)
    assert "rate 0 1000000 16384 100000000 625000" in lines
    assert "plug 2 0" in lines and "plug 0 1" in lines
    changed = TOPOLOGY.changed(changes)
    assert changed_path(changed, changes, "lab", "home").down
    assert not changed_path(changed, changes, "home", "lab").down
    assert changed_path(changed, changes, "home", "lab").rtt_ms == 191


def test_a_topology_survives_json() -> None:
    assert Topology.from_json(json.loads(json.dumps(TOPOLOGY.as_json()))) == TOPOLOGY


def test_the_real_world_is_fourteen_servers_and_a_client() -> None:
    world = real_world(subnet="44.128.0.0/16")
    assert len(world.hosts) == 15
    assert sorted(host.name for host in world.hosts if host.nat != "none") == [
        *("s07", "s08", "s10", "s12")
    ]
    assert world.path("s09", "s13").rtt_ms == world.path("s13", "s09").rtt_ms == 66.6
    assert world.ip("client") == "44.128.1.10"
