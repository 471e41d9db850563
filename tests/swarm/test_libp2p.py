"""The libp2p engine: real daemons on loopback."""

import asyncio
import contextlib
import resource
import sys
import time

import psutil
import pytest
import torch

from petals.errors import (
    AdmissionDenied,
    BootstrapFailed,
    ConfigError,
    PeerTimeout,
    PeerUnreachable,
    VersionMismatch,
)
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
from support.daemons import config, daemon_of, record

FORWARD = Forward("m", (0, 2), (1,))


async def echo(peer, message, tensors):
    return ForwardResult(0.0, 0.0), tensors


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


@pytest.mark.parametrize("transport", ["/tcp/", "/quic-v1/"])
async def test_a_refusal_arrives_whatever_the_transport(transport):
    async with SwarmNode(config(swarm_key=SwarmKey.generate(), quic=True)) as one:
        (address,) = [a for a in await one.addresses() if transport in a]
        async with SwarmNode(config(quic=True)) as stranger:
            await stranger.transport.connect(address)
            for _ in range(3):
                with pytest.raises(AdmissionDenied, match="swarm key"):
                    await stranger.ping(one.peer_id)


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


A_NODE = """
import asyncio
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode

async def main():
    async with SwarmNode(NodeConfig(host="127.0.0.1", quic=False)) as node:
        print(*await node.addresses(), flush=True)
        await asyncio.sleep(100)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_killed_node_takes_its_daemon_along_and_refuses_a_redial():
    """Its system answers for it, so nobody waits until a redial has taken too long."""
    async with SwarmNode(config()) as other:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", A_NODE, stdout=asyncio.subprocess.PIPE
        )
        address = await parent.stdout.readline()
        peer = await other.transport.connect(address.decode().strip())
        channel = await other.open_channel(peer, NODE_SERVICE)
        (daemon,) = psutil.Process(parent.pid).children()
        assert "p2pd" in " ".join(daemon.cmdline())
        parent.kill()
        with pytest.raises(PeerUnreachable):
            await channel.receive(30.0)
        with pytest.raises(PeerUnreachable):
            await other.open_channel(peer, NODE_SERVICE, 30.0)
        await parent.wait()
        await asyncio.to_thread(daemon.wait, 10.0)
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

    async def keep(channel):
        await asyncio.Event().wait()

    async with SwarmNode(config(quic=quic)) as reader, SwarmNode(config(quic=quic)) as sender:
        reader.serve("stopped", keep)
        reader.serve("echo", answering({Forward: echo}))
        transport = "/quic-v1/" if quic else "/tcp/"
        (address,) = [a for a in await reader.addresses() if transport in a]
        await sender.transport.connect(address)
        tensor = torch.zeros(2**20 // 4)
        async with (
            await sender.open_channel(reader.peer_id, "stopped") as channel,
            await sender.open_channel(reader.peer_id, "echo") as other,
        ):
            assert transport.strip("/") in channel.address.text
            num_sent = 0
            with pytest.raises(PeerTimeout):
                while True:
                    await channel.send(FORWARD, [tensor], timeout=2.0)
                    num_sent += 1
            assert 7 * tensor.nbytes <= num_sent * tensor.nbytes <= WINDOW_BYTES
            for _ in range(5):
                _, (received,) = await other.request(FORWARD, [tensor], expect=ForwardResult)
                assert torch.equal(received, tensor)
            assert await channel.ping() > 0


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


async def test_only_plain_addresses_of_others_are_remembered():
    async with SwarmNode(config()) as node:
        peer, good = Identity.generate().peer_id, "/dns4/example.org/tcp/31337"
        node.transport.learn(peer, ["/dnsaddr/example.org", "/unix/socket", "garbage"])
        assert node.transport.known() == ()
        node.transport.learn(peer, ["/dnsaddr/example.org", good])
        assert node.transport.known() == (f"{good}/p2p/{peer}",)


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
