"""Peers are remembered: few, whole, and nothing that is no address."""

import os
from pathlib import Path

import pytest

from petals.errors import BootstrapFailed
from petals.swarm.config import NodeConfig
from petals.swarm.known_peers import MAX_ADDRESSES, MAX_FILES, PeerMemory
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.types import PeerId

INITIAL = ("/ip4/1.2.3.4/tcp/1/p2p/12D3KooWone", "/ip4/1.2.3.4/tcp/2/p2p/12D3KooWtwo")


def addresses(*numbers: int) -> tuple[str, ...]:
    return tuple(f"/ip4/10.0.0.1/tcp/{number}/p2p/12D3KooW{number}" for number in numbers)


def test_the_latest_come_first_and_the_oldest_are_forgotten(tmp_path: Path) -> None:
    memory = PeerMemory(tmp_path, INITIAL, None)
    assert memory.read() == ()
    memory.add(addresses(*range(1, MAX_ADDRESSES + 1)))
    memory.add(addresses(5, 1000))
    kept = memory.read()
    assert kept[:3] == addresses(5, 1000, 1)
    assert len(kept) == MAX_ADDRESSES
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".new-")]


def test_a_swarm_is_known_by_its_initial_peers_and_its_key(tmp_path: Path) -> None:
    key = SwarmKey.generate()
    PeerMemory(tmp_path, INITIAL, key).add(addresses(1))
    assert PeerMemory(tmp_path, INITIAL[::-1], key).read() == addresses(1)
    for initial, other in ((INITIAL, None), (INITIAL[:1], key), (INITIAL, SwarmKey.generate())):
        assert PeerMemory(tmp_path, initial, other).read() == ()
    (file,) = tmp_path.iterdir()
    assert key.secret not in file.read_bytes() and key.secret.hex() not in file.name


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"no address\n/" + b"x" * 300 + b"\n/a\tb", b"/" * 100_000]
)
def test_a_broken_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    memory = PeerMemory(tmp_path, INITIAL, None)
    memory.add(addresses(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert memory.read() == ()
    memory.add(addresses(2))
    assert memory.read() == addresses(2)


def test_a_folder_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = PeerMemory(tmp_path / "file", INITIAL, None)
    memory.add(addresses(1))
    assert memory.read() == ()


def test_swarms_are_forgotten_that_nobody_joins(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 2):
        before = set(tmp_path.iterdir())
        PeerMemory(tmp_path, addresses(number), None).add(INITIAL)
        (written,) = set(tmp_path.iterdir()) - before
        os.utime(written, (number, number))
    PeerMemory(tmp_path, addresses(999), None).add(INITIAL)
    assert len(list(tmp_path.iterdir())) == MAX_FILES
    assert PeerMemory(tmp_path, addresses(0), None).read() == ()


async def test_a_node_joins_through_those_it_met_before(tmp_path: Path) -> None:
    net = MemoryNet()
    async with SwarmNode(NodeConfig(), engine=net.engine) as member:
        async with SwarmNode(NodeConfig(), engine=net.engine) as bootstrap:
            initial = await bootstrap.addresses()
        config = NodeConfig(initial_peers=initial, peer_memory=tmp_path)
        with pytest.raises(BootstrapFailed):
            async with SwarmNode(config, engine=net.engine):
                pass
        PeerMemory(tmp_path, initial, None).add(await member.addresses())
        async with SwarmNode(config, engine=net.engine) as again:
            assert await again.ping(member.peer_id) >= 0
            again.transport.learn(PeerId("12D3KooWlater"), addresses(7))
        assert PeerMemory(tmp_path, initial, None).read()[0] == addresses(7)[0]
