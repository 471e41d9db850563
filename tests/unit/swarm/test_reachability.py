import pytest

from petals.swarm.reachability import check_reachability, host_of


async def test_peers_that_can_dial_back(server, client):
    found = await client.check_reachability([server.peer_id])
    assert found.reached is True and found.num_asked == 1


async def test_peers_that_cannot(server, client):
    elsewhere = ["/ip4/203.0.113.1/tcp/1/p2p/x"]
    found = await check_reachability(client.open_channel, [server.peer_id], elsewhere)
    assert found.reached is False
    assert "--port" in found.advice


async def test_nobody_to_ask(net, server, client):
    net.kill(server.peer_id)
    found = await client.check_reachability([server.peer_id])
    assert found.reached is None and found.num_asked == 0


@pytest.mark.parametrize(
    "address, host",
    [
        ("/ip4/1.2.3.4/tcp/5/p2p/x", "/ip4/1.2.3.4"),
        ("/ip4/1.2.3.4/udp/5/quic-v1", "/ip4/1.2.3.4"),
        ("/ip4/1.2.3.4/tcp/5/p2p/x/p2p-circuit", ""),
        ("", ""),
    ],
)
def test_host_of(address, host):
    assert host_of(address) == host
