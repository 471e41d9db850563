"""A relayed stream is given up for a direct one, if that comes soon; a mute connection for a new
one.
"""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest

from petals.swarm.config import EngineParts, NodeConfig
from petals.swarm.identity import Identity
from petals.swarm.libp2p import engine
from petals.swarm.libp2p.engine import Libp2pTransport
from petals.swarm.membership import Admission
from petals.testing.manual_clock import ManualClock
from petals.types import PeerId

PEER = PeerId("peer")
DIRECT = "/ip4/1.2.3.4/udp/5/quic-v1"
RELAYED = "/ip4/5.6.7.8/tcp/9/p2p/relay/p2p-circuit"


class FakeDaemon:
    """Is connected with the peer at ``ways``; new streams take the last of them."""

    p2p = None

    def __init__(self, *parts: object) -> None:
        self.ways = [RELAYED]
        self.num_looks = 0
        self.streams: list[SimpleNamespace] = []
        self.start = self.close = AsyncMock()
        self.addresses = AsyncMock(return_value=())
        self.connect, self.disconnect = AsyncMock(), AsyncMock()

    async def connections(self) -> list[tuple[PeerId, str]]:
        self.num_looks += 1
        return [(PEER, way) for way in self.ways]

    async def open_stream(self, peer: PeerId, protocol: str) -> SimpleNamespace:
        stream = SimpleNamespace(remote=PEER, remote_address=self.ways[-1], reset=Mock())
        self.streams.append(stream)
        return stream


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    daemon = FakeDaemon()
    monkeypatch.setattr(engine, "Daemon", lambda *parts: daemon)
    monkeypatch.setattr(engine, "DhtRecords", lambda *parts: AsyncMock())
    return daemon


@pytest.fixture
async def transport(daemon: FakeDaemon, clock: ManualClock) -> AsyncIterator[Libp2pTransport]:
    identity = Identity.generate()
    admission = Admission(identity.peer_id, None)
    transport = Libp2pTransport(
        EngineParts(config=NodeConfig(), identity=identity, admission=admission, clock=clock)
    )
    await transport.start()
    yield transport
    await transport.close()


async def test_a_direct_connection_follows(transport, daemon, clock):
    opening = asyncio.create_task(transport.open_stream(PEER, "p", 30.0))
    await clock.advance(0.3)
    assert not opening.done()
    daemon.ways.append(DIRECT)
    await clock.advance(0.2)
    stream = await opening
    assert stream.remote_address == DIRECT
    assert [opened.reset.called for opened in daemon.streams] == [True, False]


@pytest.mark.parametrize(
    ("timeout", "waits"), [(30.0, 1.5), (2.0, 1.0)], ids=["enough time", "little time"]
)
async def test_it_stays_relayed(transport, daemon, clock, timeout, waits):
    """The wait takes at most half of the time limit, and comes once, not at every stream."""
    opening = asyncio.create_task(transport.open_stream(PEER, "p", timeout))
    await clock.advance(waits - 0.15)
    assert not opening.done()
    await clock.advance(0.3)
    stream = await opening
    assert stream.remote_address == RELAYED and not stream.reset.called
    await clock.advance(1.5)
    num_looks = daemon.num_looks
    assert (await transport.open_stream(PEER, "p", 30.0)).remote_address == RELAYED
    assert daemon.num_looks == num_looks > 0


async def test_a_direct_stream_waits_for_nothing(transport, daemon):
    daemon.ways.append(DIRECT)
    assert (await transport.open_stream(PEER, "p", 30.0)).remote_address == DIRECT
    assert not daemon.num_looks


OLD, NEW = "/ip4/1.2.3.4/tcp/5", "/ip4/4.3.2.1/tcp/5"


async def test_new_addresses_are_dialled_before_those_of_before(transport, daemon):
    daemon.ways.append(DIRECT)
    transport.learn(PEER, [OLD])
    transport.learn(PEER, [OLD])
    await transport.open_stream(PEER, "p", 30.0)
    daemon.connect.assert_not_awaited()
    transport.learn(PEER, [NEW])
    for _ in range(2):
        await transport.open_stream(PEER, "p", 30.0)
    daemon.connect.assert_awaited_once_with(PEER, (NEW,))


@pytest.mark.parametrize(
    ("pauses", "closes"),
    [((), False), ((0.5,), False), ((3.0,), True), ((20.0,), False), ((3.0, 3.0), True)],
)
async def test_streams_that_stay_mute_close_the_connection(
    transport, daemon, clock, pauses, closes
):
    """Two at the same time count once; one of long ago counts no more."""
    daemon.ways.append(DIRECT)
    transport.learn(PEER, [NEW])
    transport.doubt(PEER)
    for pause in pauses:
        await clock.advance(pause)
        transport.doubt(PEER)
    await clock.advance(0.0)
    assert daemon.disconnect.await_count == closes
    await transport.open_stream(PEER, "p", 30.0)
    assert daemon.connect.await_count == closes
