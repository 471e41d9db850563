import pytest

from petals.errors import PeerBusy
from petals.swarm.reachability import check_reachability, host_of
from petals.wire.messages import DialBack, DialedBack


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


async def test_peers_dial_back_only_to_the_asker_and_only_so_often(
    server, client, clock, monkeypatch
):
    dialled = []

    async def probe(address: str, timeout: float) -> bool:
        dialled.append(address)
        return False

    monkeypatch.setattr(server.transport, "probe", probe)
    own = [f"/memory/p2p/{i}" for i in range(10)]
    others = [f"/ip4/203.0.113.{i}/tcp/80" for i in range(6)]

    async def ask() -> None:
        async with await client.open_channel(server.peer_id, "node") as channel:
            message = DialBack(addresses=(*others, *own))
            answer, _ = await channel.request(message, expect=DialedBack)
            assert not answer.reached

    await ask()
    assert dialled == own[:4]
    await ask()
    with pytest.raises(PeerBusy):
        await ask()
    assert len(dialled) == 8
    await clock.advance(60.0)
    await ask()
