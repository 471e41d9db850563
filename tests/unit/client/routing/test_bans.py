"""How long a server is avoided, and why."""

from petals.client.routing.bans import Bans, Cause
from petals.types import PeerId


def test_bans_double_and_are_forgotten() -> None:
    bans, peer = Bans(10.0, 3600.0), PeerId("Qm")
    assert bans.add(peer, 0.0).until == 10.0
    assert bans.at(9.0) == {peer}
    assert not bans.at(10.0)
    assert bans.add(peer, 5.0).until == 15.0
    assert bans.add(peer, 20.0).until == 40.0
    assert bans.add(peer, 100.0).until == 110.0
    bans.lift(peer)
    assert not bans.at(101.0)
    assert bans.add(peer, 102.0).until == 112.0


def test_the_worst_cause_of_a_ban_counts() -> None:
    bans, peer = Bans(10.0, 3600.0), PeerId("Qm")
    bans.add(peer, 0.0, cause=Cause.SLOW)
    assert bans.at(1.0) and not bans.at(1.0, Cause.UNANSWERED)
    bans.add(peer, 1.0, cause=Cause.FAILED)
    bans.add(peer, 2.0, cause=Cause.UNANSWERED)
    assert bans.at(3.0, Cause.FAILED) == {peer}
    bans.add(peer, 15.0, cause=Cause.SLOW)
    assert bans.at(16.0) and not bans.at(16.0, Cause.UNANSWERED)
