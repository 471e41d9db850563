import pytest

from petals.errors import PeerBusy, PeerUnreachable
from petals.swarm.address import Address
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.swarm.reachability import check_reachability, choose_relays
from petals.wire.handshake import DialBack, DialedBack


async def test_whether_peers_can_dial_back(net, server, client):
    found = await client.check_reachability([server.peer_id])
    assert found.reached is True and found.num_asked == 1
    elsewhere = ["/ip4/203.0.113.1/tcp/1/p2p/x"]
    found = await check_reachability(client.open_channel, [server.peer_id], elsewhere)
    assert found.reached is False and "--port" in found.advice
    net.kill(server.peer_id)  # there is no peer to ask
    found = await client.check_reachability([server.peer_id])
    assert found.reached is None and found.num_asked == 0


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


def test_the_nearest_that_are_not_relayed_become_relays():
    ways = [("/ip4/1/p2p/a", 0.3), ("/ip4/2/p2p/x/p2p-circuit/p2p/b", 0.1)]
    ways += [("/ip4/3/p2p/c", 0.2), ("/ip4/4/p2p/d", 0.4), ("/ip4/5/p2p/e", 0.5)]
    found = choose_relays((Address(way), seconds) for way, seconds in ways)
    assert found == ("/ip4/3/p2p/c", "/ip4/1/p2p/a", "/ip4/4/p2p/d")


@pytest.mark.parametrize(
    "is_hidden, changes, turns",
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"relay": True}, True),
        (True, {"relay": False}, False),
        (True, {"announce_maddrs": ("/ip4/1.2.3.4/tcp/5",)}, False),
    ],
    ids=["hidden", "reachable", "--relay", "--no-relay", "--announce"],
)
async def test_who_turns_to_relays(net, clock, server, client, is_hidden, changes, turns):
    config = NodeConfig(initial_peers=await server.addresses(), **changes)
    async with SwarmNode(config, engine=net.engine, clock=clock) as node:
        if is_hidden:
            net.hide(node.peer_id)
        assert await node.become_reachable([server.peer_id]) is turns
        assert all(("/p2p-circuit/" in a) is turns for a in await node.addresses())
        if is_hidden and not turns:
            with pytest.raises(PeerUnreachable):
                await client.open_channel(node.peer_id, "node")
            return
        async with await client.open_channel(node.peer_id, "node") as channel:
            assert channel.is_relayed is is_hidden
