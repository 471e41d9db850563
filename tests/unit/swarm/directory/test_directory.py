import logging

import pytest

from petals.errors import ClockWrong
from petals.swarm.config import NodeConfig
from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord
from petals.swarm.identity import Identity
from petals.swarm.node import SwarmNode
from petals.testing.manual_clock import ManualClock
from petals.types import BlockSpan, ServerState


def record(clock: ManualClock, **changes) -> ServerRecord:
    fields = {"num_blocks": 30, "spans": ((0, 20),), "expires_at": clock.now() + 60}
    fields["state"] = ServerState.ONLINE
    return ServerRecord(peer_id="", model="m", **(fields | changes))


async def test_what_one_announces_others_see(server, client, clock):
    assert await server.directory.announce(record(clock, public_name="me"), "repo/m")
    view = await client.directory.view("m")
    assert view.num_blocks == 30
    assert view.missing() == (BlockSpan(20, 30),)
    (found,) = view.holders(3)
    assert (found.peer_id, found.public_name) == (server.peer_id, "me")
    assert found.addresses == await server.addresses()
    (model,) = await client.directory.models()
    assert (model.model, model.num_blocks, model.repository) == ("m", 30, "repo/m")


async def test_addresses_that_help_nobody_are_kept_back(server, client, clock, monkeypatch):
    lan, circuit = "/ip4/192.168.1.2/tcp/5", "/ip4/1.2.3.4/tcp/5/p2p/R/p2p-circuit/p2p/S"
    own = [f"/ip4/127.0.0.1/{kind}/5" for kind in ("tcp", "udp")]

    async def announced(*addresses: str) -> ServerRecord:
        async def told() -> tuple[str, ...]:
            return addresses

        monkeypatch.setattr(server.transport, "addresses", told)
        await server.directory.announce(record(clock))
        return (await client.directory.view("m")).records[server.peer_id]

    found = await announced(*own, lan, circuit)
    assert found.addresses == (circuit, lan) and found.relayed
    assert (await announced(*own)).addresses == tuple(own)
    found = await announced(*own, lan)
    assert found.addresses == (lan,) and not found.relayed


async def test_nobody_serves_the_model(client):
    view = await client.directory.view("nothing")
    assert view.num_blocks == 0 and not view.records
    assert (await client.directory.view("nothing", 4)).missing() == (BlockSpan(0, 4),)
    assert await client.directory.models() == ()


async def test_records_expire(server, client, clock):
    await server.directory.announce(record(clock))
    await clock.advance(61.0)
    assert not (await client.directory.view("m", 30)).records
    assert await client.directory.models() == ()


async def test_state_changes_are_seen_at_once(server, client, clock):
    await server.directory.announce(record(clock, expires_at=clock.now() + 90))
    await server.directory.announce(record(clock, state=ServerState.DRAINING))
    view = await client.directory.view("m")
    assert view.records[server.peer_id].state is ServerState.DRAINING
    assert view.holders(3) == ()
    await server.directory.announce(record(clock, state=ServerState.OFFLINE))
    assert not (await client.directory.view("m", 30)).records


async def test_a_span_that_moved_leaves_its_old_buckets(server, client, clock):
    await server.directory.announce(record(clock, spans=((0, 10),)))
    await server.directory.announce(record(clock, spans=((17, 27),)))
    view = await client.directory.view("m")
    assert view.missing() == (BlockSpan(0, 17), BlockSpan(27, 30))


async def test_what_others_put_in_is_checked_again(server, client, clock):
    await server.directory.announce(record(clock))
    store, key = server.transport.records, records.block_key("m", 0, 0, 0)
    expiry = clock.now() + 100
    forged = records.seal(record(clock, expires_at=expiry), Identity.generate())
    await store.store(key, server.peer_id, forged, expiry)
    await store.store(key, "nobody", b"garbage", expiry)
    await store.store(records.MODELS_KEY, "nobody", b"garbage", expiry)
    view = await client.directory.view("m", 16)
    assert view.records == {}


async def store_crowd(node: SwarmNode, clock: ManualClock, size: int, lifetime: float) -> set[str]:
    """Records of many servers of blocks 0:4, put where they belong; their peer ids.

    Just as many of them are in the sample as there should be: chance would have it otherwise.
    """
    store, expiry = node.transport.records, clock.now() + lifetime
    bits = records.shard_bits_for(size)
    peers: set[str] = set()
    num_left = {True: size >> bits, False: size - (size >> bits)}
    while len(peers) < size:
        identity = Identity.generate()
        is_sample = records.shard_of(identity.peer_id, bits) == 0
        if not num_left[is_sample]:
            continue
        num_left[is_sample] -= 1
        entry = ServerRecord(
            peer_id=identity.peer_id,
            model="m",
            num_blocks=4,
            spans=((0, 4),),
            state=ServerState.ONLINE,
            expires_at=expiry,
            shard_bits=bits,
        )
        for key in records.keys_to_store(entry):
            await store.store(key, identity.peer_id, records.seal(entry, identity), expiry)
        peers.add(identity.peer_id)
    return peers


async def test_a_large_swarm_is_read_in_parts_or_whole(client, clock):
    peers = await store_crowd(client, clock, 300, lifetime=400.0)
    seen = set((await client.directory.view("m", 4)).records)
    assert 15 < len(seen) < 100
    later = seen
    for _ in range(3):  # a shard may hold nobody new
        await clock.advance(60.0)
        later = set((await client.directory.view("m", 4)).records)
    assert seen < later < peers
    whole = await client.directory.view("m", 4, whole=True)
    assert set(whole.records) == peers


async def test_what_was_read_is_kept_until_it_expires(client, clock):
    await store_crowd(client, clock, 300, lifetime=100.0)
    assert (await client.directory.view("m", 4)).records
    await clock.advance(101.0)
    assert not (await client.directory.view("m", 4)).records


async def test_a_server_of_a_large_swarm_announces_where_readers_look(server, client, clock):
    """Its first announcement asks how large the swarm is, and lives as long as it is kept."""
    await store_crowd(client, clock, 300, lifetime=400.0)
    await server.directory.announce(record(clock, spans=((0, 4),), num_blocks=4))
    own = (await client.directory.view("m", 4, whole=True)).records[server.peer_id]
    assert own.shard_bits == records.shard_bits_for(300)
    assert own.expires_at == clock.now() + records.KEPT_SECONDS
    await server.directory.announce(
        record(clock, spans=((0, 4),), num_blocks=4, state=ServerState.OFFLINE)
    )
    assert server.peer_id not in (await client.directory.view("m", 4, whole=True)).records


async def test_records_are_stored_again_after_a_restart(server, client, clock, net):
    await server.directory.announce(record(clock))
    net.records_of(b"").clear()
    await server.transport.use_relays(())  # starts the engine again
    await clock.advance(0.0)
    assert server.peer_id in (await client.directory.view("m")).records


async def test_clocks_that_differ_are_noticed(net, server, client, clock, caplog):
    assert await client.clock_skew(server.peer_id) == pytest.approx(0.0)
    ahead = ManualClock(clock.now() + 10.0)
    config = NodeConfig(initial_peers=await server.addresses())
    with caplog.at_level(logging.WARNING, logger="petals"):
        async with SwarmNode(config, engine=net.engine, clock=ahead) as node:
            assert "differs from ours by -10.0 s" in caplog.text
            caplog.clear()
            await node.clock_skew(server.peer_id)
            assert not caplog.text


@pytest.mark.parametrize(("seconds", "side"), [(600.0, "ahead of"), (-600.0, "behind")])
async def test_a_member_with_another_time_than_all_is_refused(net, server, clock, seconds, side):
    config = NodeConfig(initial_peers=await server.addresses())
    wrong = ManualClock(clock.now() + seconds)
    with pytest.raises(ClockWrong, match=f"is 600 s {side} those of the swarm"):
        async with SwarmNode(config, engine=net.engine, clock=wrong):
            pass


async def test_records_that_outlive_their_signature_are_ignored(server, client, clock):
    """A peer that keeps records may lie about when they expire, not about what is signed."""
    entry = record(clock, expires_at=clock.now() + 10**6)
    entry = ServerRecord(
        **{f: getattr(entry, f) for f in entry.__struct_fields__} | {"peer_id": server.peer_id}
    )
    value = records.seal(entry, server.identity)
    key = records.block_key("m", 0, 0, 0)
    for expires_at in (entry.expires_at, clock.now() + 60):
        await server.transport.records.store(key, server.peer_id, value, expires_at)
        assert not (await client.directory.view("m", 30)).records
