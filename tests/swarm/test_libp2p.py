"""The libp2p engine: real daemons on loopback."""

import asyncio
import contextlib
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from petals.errors import (
    AdmissionDenied,
    BootstrapFailed,
    ConfigError,
    PeerUnreachable,
    VersionMismatch,
)
from petals.swarm.config import NodeConfig
from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord
from petals.swarm.identity import Identity
from petals.swarm.libp2p.daemon import Daemon
from petals.swarm.libp2p.engine import Libp2pTransport
from petals.swarm.membership import SwarmKey
from petals.swarm.node import SwarmNode
from petals.swarm.reachability import NODE_SERVICE
from petals.swarm.rpc.dispatcher import answering
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES
from petals.types import BlockSpan, ServerState
from petals.wire.passes import Forward, ForwardResult

FORWARD = Forward("m", (0, 2), (1,))


def config(**changes) -> NodeConfig:
    return NodeConfig(host="127.0.0.1", **({"quic": False} | changes))


async def echo(peer, message, tensors):
    return ForwardResult(0.0, 0.0), tensors


def record(**changes) -> ServerRecord:
    fields = {"spans": ((0, 20),), "state": ServerState.ONLINE, "expires_at": time.time() + 60}
    return ServerRecord(peer_id="", model="m", num_blocks=30, **(fields | changes))


def daemon_of(node: SwarmNode) -> psutil.Process:
    """The daemon that runs with the node's key."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError):
            (key,) = [word[4:] for word in child.cmdline() if word.startswith("-id=")] or [""]
            if key and Path(key).read_bytes() == node.identity.to_bytes():
                return child
    raise AssertionError("the node has no daemon")


async def until(condition) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


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
            processes = [daemon_of(node).pid for node in (bootstrap, server, client)]
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
                daemon_of(server).kill()
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
                print(node.peer_id, flush=True)
                await asyncio.sleep(100)

        asyncio.run(main())
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline()
        (daemon,) = psutil.Process(parent.pid).children()
        assert "p2pd" in " ".join(daemon.cmdline())
        parent.kill()
        daemon.wait(timeout=10.0)
    assert not daemon.is_running()


async def test_an_address_of_an_old_swarm():
    """A peer of hivemind without our protocol, with the RSA identity that old swarms had."""
    from hivemind.p2p import P2P

    old = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        join = tuple(str(address) for address in await old.get_visible_maddrs())
        started = time.monotonic()
        with pytest.raises(VersionMismatch, match="old swarm") as caught:
            async with SwarmNode(config(initial_peers=join, client_mode=True)):
                pass
        assert time.monotonic() - started < 5.0
        for words in ("another protocol", "no public swarm", "petals swarm up", "--join"):
            assert words in caught.value.hint
        async with SwarmNode(config()) as ours:
            both = (*join, *await ours.addresses())
            async with SwarmNode(config(initial_peers=both)) as node:
                assert await node.ping(ours.peer_id) > 0
    finally:
        await old.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("quic", [False, True], ids=["tcp", "quic"])
async def test_a_reader_that_stops_holds_its_sender_and_nobody_else(quic):
    """The same as over the network in memory, between two daemons: what the sender has handed out
    is bounded by the window, though the stream itself would take more.
    """
    inbound: asyncio.Queue = asyncio.Queue()

    async def keep(channel):
        await inbound.put(channel)
        await asyncio.Event().wait()

    async with SwarmNode(config(quic=quic)) as reader, SwarmNode(config(quic=quic)) as sender:
        reader.serve("stopped", keep)
        reader.serve("echo", answering({Forward: echo}))
        transport = "/quic-v1/" if quic else "/tcp/"
        (address,) = [a for a in await reader.addresses() if transport in a]
        await sender.transport.connect(address)
        num_sent = 0

        async def flood(channel) -> None:
            nonlocal num_sent
            while True:
                await channel.send(FORWARD, [tensor])
                num_sent += 1

        tensor = torch.zeros(2**20 // 4)
        async with (
            await sender.open_channel(reader.peer_id, "stopped") as channel,
            await sender.open_channel(reader.peer_id, "echo") as other,
        ):
            assert transport.strip("/") in channel.address.text
            flooding = asyncio.create_task(flood(channel))
            stopped = await inbound.get()
            await until(
                lambda: channel._credit_waiters and stopped._inbox._unread_bytes > 7 * 2**20
            )
            held = stopped._inbox._unread_bytes
            assert held <= WINDOW_BYTES and num_sent * 2**20 <= WINDOW_BYTES
            assert channel._stream._writer.transport.get_write_buffer_size() == 0
            for _ in range(5):
                _, (received,) = await other.request(FORWARD, [tensor], expect=ForwardResult)
                assert torch.equal(received, tensor)
            assert await channel.ping() > 0
            assert stopped._inbox._unread_bytes <= held + 2**20 and not flooding.done()
            assert reader._parts.budget.used_bytes <= WINDOW_BYTES + 2 * 2**20
            flooding.cancel()
            await asyncio.wait({flooding})


async def test_more_streams_than_the_process_has_sockets_for():
    """A node takes half as many inbound streams as its process may open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        one = SwarmNode(config(), engine=Libp2pTransport)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as other:
            async with contextlib.AsyncExitStack() as channels:
                with pytest.raises(PeerUnreachable):
                    for _ in range(21):
                        channel = await other.open_channel(one.peer_id, NODE_SERVICE)
                        await channels.enter_async_context(channel)
            assert await other.ping(one.peer_id) > 0


async def test_calls_to_the_directory_are_bounded():
    async with SwarmNode(config()) as one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as other:
            protocol, to = other.transport.records._node.protocol, await hivemind_id(one)
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


async def test_only_plain_addresses_of_others_are_remembered():
    async with SwarmNode(config()) as node:
        peer = Identity.generate().peer_id
        node.transport.learn(peer, ["/dnsaddr/example.org", "/unix/socket", "garbage"])
        assert peer not in node.transport._known
        good = "/dns4/example.org/tcp/31337"
        node.transport.learn(peer, ["/dnsaddr/example.org", good])
        assert node.transport._known[peer] == (good,)


@pytest.mark.slow
async def test_a_daemon_that_ends_again_while_it_starts():
    async with SwarmNode(config()) as node:
        restarted = asyncio.Event()
        node.transport.on_restart(restarted.set)
        starts = []
        serve = Daemon.serve

        async def die_once(daemon, protocol, accept):
            await serve(daemon, protocol, accept)
            starts.append(daemon)
            if len(starts) == 1:
                daemon_of(node).kill()
                await until(lambda: daemon.has_ended)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Daemon, "serve", die_once)
            daemon_of(node).kill()
            await asyncio.wait_for(restarted.wait(), 20.0)
        assert len(starts) == 2
        assert await node.addresses()


async def test_leaving_ends_calls_to_the_directory():
    """hivemind leaves them to themselves; a peer that does not answer must not hold us."""
    asked = asyncio.Event()

    async def never(request, context):
        asked.set()
        await asyncio.Event().wait()

    async with SwarmNode(config()) as one:
        async with SwarmNode(config(initial_peers=await one.addresses())) as other:
            one.transport.records._node.protocol.rpc_find = never
            protocol = other.transport.records._node.protocol
            call = asyncio.create_task(protocol.call_find(await hivemind_id(one), []))
            await asked.wait()
        assert call.done()
        assert not other.transport.records._calls


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


@pytest.mark.slow
async def test_a_dead_peer_refuses_a_redial_and_says_so():
    """Its system answers for it, so nobody waits until a redial has taken too long."""
    async with SwarmNode(config()) as one, SwarmNode(config()) as other:
        (address,) = await one.addresses()
        await other.transport.connect(address)
        channel = await other.open_channel(one.peer_id, "node")
        daemon_of(one).suspend()
        one.transport._up.clear()  # it is not to start again
        daemon_of(one).kill()
        with pytest.raises(PeerUnreachable):
            await channel.receive(30.0)
        with pytest.raises(PeerUnreachable):
            await other.open_channel(one.peer_id, "node", 30.0)


@pytest.mark.slow
async def test_turning_to_relays_keeps_id_and_port(tmp_path):
    """The daemon starts anew; streams are opened and records stored as before. (Between peers of
    one machine there is always a direct way; benchmarks/real_world.py goes through relays.)
    """
    async with SwarmNode(config()) as relay:
        join = await relay.addresses()
        hiding = config(initial_peers=join, relay=True, identity_path=tmp_path / "id")
        async with SwarmNode(hiding) as hidden:
            hidden.serve("echo", answering({Forward: echo}))
            assert await hidden.directory.announce(record())
            addresses, first = await hidden.addresses(), daemon_of(hidden).pid
            assert await hidden.become_reachable()
            assert daemon_of(hidden).pid != first
            assert set(addresses) <= set(await hidden.addresses())
            # The relay remembers us as one who keeps records and names us to ourselves.
            assert await hidden.directory.announce(record(spans=((10, 20),)))
            async with SwarmNode(config(initial_peers=join, client_mode=True)) as client:
                (found,) = (await client.directory.view("m", 30)).records.values()
                assert found.peer_id == hidden.peer_id and found.spans == ((10, 20),)
                async with await client.open_channel(hidden.peer_id, "echo") as channel:
                    tensor = torch.randn(1000)
                    _, (received,) = await channel.request(FORWARD, [tensor], expect=ForwardResult)
                    assert torch.equal(tensor, received)
