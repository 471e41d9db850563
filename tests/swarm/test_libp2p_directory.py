"""The directory over the libp2p engine: who may write what, and who finds it again."""

import asyncio
import time

import pytest
import torch

from petals.errors import (
    AdmissionDenied,
    BootstrapFailed,
)
from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord
from petals.swarm.identity import Identity
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.dispatcher import answering
from petals.wire.passes import Forward, ForwardResult
from support.daemons import config, record, two_members

FORWARD = Forward("m", (0, 2), (1,))


async def echo(peer, message, tensors):
    return ForwardResult(0.0, 0.0), tensors


@pytest.mark.slow
async def test_a_private_swarm():
    key = SwarmKey.generate()
    async with SwarmNode(config(swarm_key=key)) as one:
        join = await one.addresses()
        for wrong in (None, SwarmKey.generate()):
            with pytest.raises(AdmissionDenied):
                async with SwarmNode(config(initial_peers=join, swarm_key=wrong)):
                    pass
        async with (
            SwarmNode(config(initial_peers=join, swarm_key=key)) as two,
            SwarmNode(config()) as stranger,
        ):
            assert await two.directory.announce(record())
            (address,) = await one.addresses()
            await stranger.transport.connect(address)
            answer = await dht_of(stranger).call_ping(await hivemind_id(one))
            assert answer is None
            await store_past_the_gate(stranger, one)
            view = await two.directory.view("m")
            assert set(view.records) == {two.peer_id}
            assert not (await stranger.directory.view("m", 30)).records


def dht_of(node: SwarmNode):
    """What a peer may send that does not use our directory: hivemind's calls to other peers."""
    return node.transport.records._node.protocol


async def hivemind_id(node: SwarmNode):
    from hivemind.p2p import PeerID

    return PeerID.from_base58(node.peer_id)


async def store_past_the_gate(stranger: SwarmNode, member: SwarmNode) -> None:
    """What a stranger who knows everything but the key would send: a sound record of its own."""
    from hivemind.dht.routing import DHTID

    expiry = time.time() + 100
    own = record(expires_at=expiry)
    own = ServerRecord(
        **{f: getattr(own, f) for f in own.__struct_fields__} | {"peer_id": stranger.peer_id}
    )
    protocol = dht_of(stranger)
    key = DHTID.generate(source=records.block_key("m", 0, 0, 0))
    value = protocol.serializer.dumps(records.seal(own, stranger.identity))
    to = await hivemind_id(member)
    assert await protocol.call_store(to, [key], [value], expiry, subkeys=[stranger.peer_id]) is None


@pytest.mark.slow
async def test_members_keep_only_sound_records():
    async with two_members() as (one, two):
        expiry, key = time.time() + 60, records.block_key("m", 0, 0, 0)
        store = two.transport.records
        forged = records.seal(record(expires_at=expiry), Identity.generate())
        assert not await store.store(key, one.peer_id, forged, expiry)
        assert not await store.store(key, two.peer_id, b"garbage", expiry)
        assert (await one.transport.records.get([key]))[key] == {}


async def test_calls_to_the_directory_are_bounded():
    async with two_members() as (one, other):
        protocol, to = dht_of(other), await hivemind_id(one)
        assert await protocol.call_ping(to) is not None
        keys = [records.block_key("m", 0, 0, 0)]
        assert await store_many(protocol, to, keys * 10) is not None
        assert await store_many(protocol, to, keys * 4000) is None


async def store_many(protocol, to, keys):
    from hivemind.dht.routing import DHTID

    ids = [DHTID.generate(source=key) for key in keys]
    values = [b"no record, but long enough to count" * 3] * len(ids)
    expiry = time.time() + 60
    return await protocol.call_store(to, ids, values, expiry, subkeys=["x"] * len(ids))


async def test_leaving_ends_calls_to_the_directory():
    """hivemind leaves them to themselves; a peer that does not answer must not hold us."""
    asked = asyncio.Event()

    async def never(request, context):
        asked.set()
        await asyncio.Event().wait()

    async with SwarmNode(config()) as one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as other:
            dht_of(one).rpc_find = never
            protocol = dht_of(other)
            call = asyncio.create_task(protocol.call_find(await hivemind_id(one), []))
            await asked.wait()
        assert call.done()


@pytest.mark.slow
async def test_a_bootstrap_that_was_restarted_learns_of_the_swarm_again(tmp_path):
    first = config(identity_path=tmp_path / "id")
    async with SwarmNode(first) as bootstrap:
        (address,) = await bootstrap.addresses()
        joining = config(initial_peers=(address,), rejoin_seconds=0.2)
        server = await SwarmNode(joining).__aenter__()
        await server.directory.announce(record())
    again = config(identity_path=tmp_path / "id", port=int(address.split("/")[4]))
    async with SwarmNode(again) as bootstrap:
        deadline = time.monotonic() + 20.0
        while not (found := (await bootstrap.directory.view("m", 30)).records):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert set(found) == {server.peer_id}
        await server.close()


@pytest.mark.slow
async def test_the_swarm_is_joined_without_its_bootstrap_peer(tmp_path):
    """Who was there before carries on; a new one finds the members that were remembered."""
    async with SwarmNode(config()) as bootstrap:
        join = await bootstrap.addresses()
        server = await SwarmNode(config(initial_peers=join)).__aenter__()
        remembering = config(initial_peers=join, client_mode=True, peer_memory=tmp_path)
        old = await SwarmNode(remembering).__aenter__()
        server.serve("echo", answering({Forward: echo}))
        await server.directory.announce(record(), "repo/m")
        await old.directory.view("m")
        async with SwarmNode(remembering) as first:
            await first.directory.view("m")
    try:
        with pytest.raises(BootstrapFailed):
            async with SwarmNode(config(initial_peers=join)):
                pass
        async with SwarmNode(remembering) as new:
            for client in (old, new):
                assert set((await client.directory.view("m")).records) == {server.peer_id}
                async with await client.open_channel(server.peer_id, "echo") as channel:
                    await channel.request(FORWARD, [torch.ones(1)], expect=ForwardResult)
            assert await server.directory.announce(record())
    finally:
        await old.close()
        await server.close()
