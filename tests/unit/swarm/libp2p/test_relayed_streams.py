"""A relayed stream is given up for a direct one, if that comes soon."""

import asyncio

import pytest

from petals.clock import SystemClock
from petals.swarm.config import EngineParts, NodeConfig
from petals.swarm.identity import Identity
from petals.swarm.libp2p import engine
from petals.swarm.libp2p.engine import Libp2pTransport
from petals.swarm.membership import Admission
from petals.types import PeerId

PEER = PeerId("peer")
DIRECT = "/ip4/1.2.3.4/udp/5/quic-v1"
RELAYED = "/ip4/5.6.7.8/tcp/9/p2p/relay/p2p-circuit"


class FakeStream:
    remote = PEER

    def __init__(self, remote_address: str) -> None:
        self.remote_address = remote_address
        self.was_reset = False

    def reset(self) -> None:
        self.was_reset = True


class FakeDaemon:
    """Meets the peer at ``ways``; new streams take the last of them."""

    def __init__(self) -> None:
        self.ways = [RELAYED]
        self.num_looks = 0
        self.was_looked_at = asyncio.Event()
        self.streams: list[FakeStream] = []

    async def connections(self) -> list[tuple[PeerId, str]]:
        self.num_looks += 1
        self.was_looked_at.set()
        return [(PEER, way) for way in self.ways]

    async def open_stream(self, peer: PeerId, protocol: str) -> FakeStream:
        self.streams.append(FakeStream(self.ways[-1]))
        return self.streams[-1]


@pytest.fixture
def transport() -> Libp2pTransport:
    identity = Identity.generate()
    parts = EngineParts(
        config=NodeConfig(),
        identity=identity,
        admission=Admission(identity.peer_id, None),
        clock=SystemClock(),
    )
    transport = Libp2pTransport(parts)
    transport._daemon = FakeDaemon()
    transport._up.set()
    return transport


async def test_a_direct_connection_follows(transport):
    opening = asyncio.create_task(transport.open_stream(PEER, "p", 30.0))
    await transport._daemon.was_looked_at.wait()
    assert not opening.done()
    transport._daemon.ways.append(DIRECT)
    stream = await opening
    assert stream.remote_address == DIRECT and not stream.was_reset
    assert transport._daemon.streams[0].was_reset


async def test_it_stays_relayed(transport, monkeypatch):
    monkeypatch.setattr(engine, "_PUNCH_SECONDS", 0.25)
    stream = await transport.open_stream(PEER, "p", 30.0)
    assert stream.remote_address == RELAYED and not stream.was_reset
    num_looks = transport._daemon.num_looks
    assert num_looks > 0
    again = await transport.open_stream(PEER, "p", 30.0)
    assert again.remote_address == RELAYED
    assert transport._daemon.num_looks == num_looks, "it waits once, not at every stream"


async def test_who_has_little_time_does_not_spend_it_all(transport):
    stream = await transport.open_stream(PEER, "p", 0.4)
    assert stream.remote_address == RELAYED


async def test_a_direct_stream_waits_for_nothing(transport):
    transport._daemon.ways.append(DIRECT)
    stream = await transport.open_stream(PEER, "p", 30.0)
    assert stream.remote_address == DIRECT
    assert not transport._daemon.num_looks
