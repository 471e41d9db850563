"""The second engine keeps the seam honest: what it promises, and how it can be disturbed."""

import asyncio

import pytest

from petals.errors import PeerTimeout, PeerUnreachable

PROTOCOL = "/test"


@pytest.fixture
async def ends(connect):
    return await connect()


async def test_bytes_arrive_in_order(ends, client):
    ours, theirs = ends
    assert theirs.remote == client.peer_id
    ours.write(b"abc")
    ours.write(memoryview(b"defgh"))
    assert await theirs.read_exactly(2) == b"ab"
    assert await theirs.read_exactly(5) == b"cdefg"
    await ours.close()
    assert await theirs.read_exactly(1) == b"h"
    with pytest.raises(PeerUnreachable):
        await theirs.read_exactly(1)


async def test_a_cut_link_swallows(net, ends, server, client, clock):
    ours, theirs = ends
    net.cut(server.peer_id, client.peer_id)
    ours.write(b"lost")
    reading = asyncio.create_task(theirs.read_exactly(1))
    opening = asyncio.create_task(client.transport.open_stream(server.peer_id, PROTOCOL, 5.0))
    await clock.advance(5.1)
    assert not reading.done()
    with pytest.raises(PeerTimeout):
        await opening
    net.heal(server.peer_id, client.peer_id)
    await client.transport.open_stream(server.peer_id, PROTOCOL, 5.0)
    theirs.reset()
    with pytest.raises(PeerUnreachable):
        await reading


async def test_a_killed_peer_is_gone_at_once(net, server, client):
    net.kill(server.peer_id)
    with pytest.raises(PeerUnreachable):
        await client.transport.open_stream(server.peer_id, PROTOCOL, 1.0)
    with pytest.raises(PeerUnreachable):
        await client.transport.connect(f"/memory/p2p/{server.peer_id}")


async def test_who_is_hidden_is_reached_through_relays(net, ends, server, client):
    ours, theirs = ends
    net.hide(server.peer_id)
    (address,) = await server.addresses()
    assert not await client.transport.probe(address, 1.0)
    with pytest.raises(PeerUnreachable):
        await client.transport.open_stream(server.peer_id, PROTOCOL, 1.0)
    assert await server.transport.open_stream(client.peer_id, "/petals/stream", 1.0)
    await server.transport.use_relays(await client.addresses())
    with pytest.raises(PeerUnreachable):
        await ours.read_exactly(1)
    stream = await client.transport.open_stream(server.peer_id, PROTOCOL, 1.0)
    assert "/p2p-circuit" in stream.remote_address
    assert "/p2p-circuit" in (await server.addresses())[0]


async def test_later_expiry_wins(server, client, clock):
    one, other = server.transport.records, client.transport.records
    assert await one.store("key", "sub", b"old", clock.now() + 10)
    assert await other.store("key", "sub", b"new", clock.now() + 20)
    assert not await one.store("key", "sub", b"late", clock.now() + 15)
    assert not await one.store("key", "other", b"past", clock.now() - 1)
    found = await other.get(["key", "nothing"])
    assert {k: v.value for k, v in found["key"].items()} == {"sub": b"new"}
    assert found["nothing"] == {}
    await clock.advance(21.0)
    assert (await one.get(["key"]))["key"] == {}
