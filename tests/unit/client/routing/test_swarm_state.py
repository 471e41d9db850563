"""How long a client avoids a server, by what it has seen of it."""

from types import SimpleNamespace

import pytest

from petals.client.config import ClientConfig
from petals.client.routing.swarm_state import SwarmState
from petals.errors import PeerFailed, PeerMisbehaved, PetalsError, from_wire
from petals.testing.manual_clock import ManualClock
from petals.types import PeerId

PEER = PeerId("server")


@pytest.mark.parametrize(
    ("error", "factor"),
    [
        (PeerFailed("It failed."), 1.0),
        (PeerMisbehaved("It answered with NaN."), 16.0),
        (from_wire(PeerMisbehaved.code, "I am wrong.", "", PEER), 1.0),  # hearsay of itself
    ],
    ids=["failed", "seen to be wrong", "says that it is wrong"],
)
async def test_a_wrong_answer_is_avoided_for_longer(error: PetalsError, factor: float) -> None:
    clock, config = ManualClock(), ClientConfig(initial_peers=())
    swarm = SwarmState(SimpleNamespace(clock=clock), config, "toy", 4)
    swarm.note_failure(PEER, error)
    seconds = factor * config.ban_timeout
    assert swarm.bans.at(clock.monotonic() + seconds - 1) == {PEER}
    assert not swarm.bans.at(clock.monotonic() + seconds)
