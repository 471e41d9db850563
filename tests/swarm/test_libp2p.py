"""The libp2p engine: real daemons on loopback."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch

from petals.errors import AdmissionDenied, BootstrapFailed, ConfigError, PeerUnreachable
from petals.swarm import records
from petals.swarm.admission import SwarmKey
from petals.swarm.config import NodeConfig
from petals.swarm.identity import Identity
from petals.swarm.node import SwarmNode
from petals.swarm.records import ServerRecord
from petals.swarm.rpc import answering
from petals.types import BlockSpan, ServerState
from petals.wire.messages import Forward, ForwardResult

FORWARD = Forward("m", (0, 2), (1,))


def config(**changes) -> NodeConfig:
    return NodeConfig(host="127.0.0.1", **({"quic": False} | changes))


async def echo(peer, message, tensors):
    return ForwardResult(0.0, 0.0), tensors


def record(**changes) -> ServerRecord:
    fields = {"spans": ((0, 20),), "state": ServerState.ONLINE, "expires_at": time.time() + 60}
    return ServerRecord(peer_id="", model="m", num_blocks=30, **(fields | changes))


@pytest.mark.slow
async def test_a_swarm_of_three(tmp_path):
    """Bootstrap, server, client: streams with tensors, records, reachability, a clean end."""
    server_config = config(identity_path=tmp_path / "id", quic=True)
    async with SwarmNode(config()) as bootstrap:
        join = await bootstrap.addresses()
        async with (
            SwarmNode(config(initial_peers=join, identity_path=tmp_path / "id")) as server,
            SwarmNode(config(initial_peers=join, client_mode=True)) as client,
        ):
            server.serve("echo", answering({Forward: echo}))
            assert await server.directory.announce(record(), "repo/m")
            view = await client.directory.view("m")
            assert view.missing() == (BlockSpan(20, 30),)
            (found,) = view.holders(0)
            assert found.peer_id == server.peer_id
            async with await client.open_channel(server.peer_id, "echo") as channel:
                for num_values in (0, 2048, 6_000_000):
                    sent = torch.randn(num_values)
                    _, (received,) = await channel.request(FORWARD, [sent], expect=ForwardResult)
                    assert torch.equal(sent, received)
            assert 0 < await client.ping(server.peer_id) < 1
            assert (await server.check_reachability([bootstrap.peer_id])).reached is True
            await server.directory.announce(record(state=ServerState.OFFLINE))
            assert not (await client.directory.view("m", 30)).records
            processes = [n.transport._daemon.process_id for n in (bootstrap, server, client)]
            peer_id = server.peer_id
        async with SwarmNode(server_config) as again:
            assert again.peer_id == peer_id
            assert any("quic-v1" in address for address in await again.addresses())
    assert not [pid for pid in processes if psutil.pid_exists(pid)]


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
            dht = stranger.transport.records
            answer = await dht._node.protocol.call_ping(await hivemind_id(one))
            assert answer is None
            await store_past_the_gate(stranger, one)
            view = await two.directory.view("m")
            assert set(view.records) == {two.peer_id}
            assert not (await stranger.directory.view("m", 30)).records


@pytest.mark.parametrize("transport", ["/tcp/", "/quic-v1/"])
async def test_a_refusal_arrives_whatever_the_transport(transport):
    async with SwarmNode(config(swarm_key=SwarmKey.generate(), quic=True)) as one:
        (address,) = [a for a in await one.addresses() if transport in a]
        async with SwarmNode(config(quic=True)) as stranger:
            await stranger.transport.connect(address)
            for _ in range(3):
                with pytest.raises(AdmissionDenied, match="swarm key"):
                    await stranger.ping(one.peer_id)


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
    protocol = stranger.transport.records._node.protocol
    key = DHTID.generate(source=records.block_key("m", 0, 0, 0))
    value = protocol.serializer.dumps(records.seal(own, stranger.identity))
    to = await hivemind_id(member)
    assert await protocol.call_store(to, [key], [value], expiry, subkeys=[stranger.peer_id]) is None


@pytest.mark.slow
async def test_members_keep_only_sound_records():
    async with SwarmNode(config()) as one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as two:
            expiry, key = time.time() + 60, records.block_key("m", 0, 0, 0)
            store = two.transport.records
            forged = records.seal(record(expires_at=expiry), Identity.generate())
            assert not await store.store(key, one.peer_id, forged, expiry)
            assert not await store.store(key, two.peer_id, b"garbage", expiry)
            assert (await one.transport.records.get([key]))[key] == {}


async def test_bootstrap_that_does_not_answer():
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
    started = time.monotonic()
    with pytest.raises(BootstrapFailed, match="tcp/9") as caught:
        async with SwarmNode(config(initial_peers=(nobody,))):
            pass
    assert time.monotonic() - started < 10.0
    assert caught.value.hint


async def test_bootstrap_that_takes_the_call_and_says_nothing():
    """A port that accepts and stays silent: the dial itself must end within five seconds."""
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}"
    node = SwarmNode(config(initial_peers=(address,)))
    started = time.monotonic()
    with pytest.raises(BootstrapFailed):
        async with node:
            pass
    assert time.monotonic() - started < 8.0
    silent.close()


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/9", "127.0.0.1:9"])
async def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="not an address"):
        async with SwarmNode(config(initial_peers=(address,))):
            pass


async def test_a_port_in_use():
    async with SwarmNode(config()) as one:
        port = int((await one.addresses())[0].split("/")[4])
        with pytest.raises(ConfigError, match="could not start"):
            async with SwarmNode(config(port=port)):
                pass


@pytest.mark.slow
async def test_a_lost_daemon_is_started_again():
    """Same id, same address; the records are announced again without being asked to."""
    async with SwarmNode(config()) as bootstrap:
        join = await bootstrap.addresses()
        async with SwarmNode(config(initial_peers=join)) as server:
            await server.directory.announce(record())
            before = await server.addresses()
            restarted = asyncio.Event()
            server.transport.on_restart(restarted.set)
            async with await bootstrap.open_channel(server.peer_id, "node") as channel:
                os.kill(server.transport._daemon.process_id, signal.SIGKILL)
                with pytest.raises(PeerUnreachable):
                    await channel.receive(timeout=10.0)
            await asyncio.wait_for(restarted.wait(), 20.0)
            assert await server.addresses() == before
            assert await server.ping(bootstrap.peer_id) > 0
            assert await bootstrap.ping(server.peer_id) > 0
            view = await bootstrap.directory.view("m")
            assert server.peer_id in view.records


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
def test_the_daemon_ends_with_its_parent():
    """Even if the parent is killed."""
    script = textwrap.dedent("""
        import asyncio
        from petals.swarm.config import NodeConfig
        from petals.swarm.node import SwarmNode

        async def main():
            async with SwarmNode(NodeConfig(host="127.0.0.1", quic=False)) as node:
                print(node.transport._daemon.process_id, flush=True)
                await asyncio.sleep(100)

        asyncio.run(main())
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        daemon = psutil.Process(int(parent.stdout.readline()))
        assert "p2pd" in " ".join(daemon.cmdline())
        parent.kill()
        daemon.wait(timeout=10.0)
    assert not daemon.is_running()
