"""What a successor has of rows that go on changing."""

from petals.client.session.types import ReplicaProgress


def test_plain_steps_leave_what_is_held() -> None:
    held = ReplicaProgress.all_of((5, 3)).after(None, (5, 3))
    assert held == ReplicaProgress((0, 1), (5, 3))
    assert held.missing((7, 3)) == (2, 0)


def test_what_is_rolled_back_is_held_no_more() -> None:
    held = ReplicaProgress.all_of((5, 3)).after(None, (2, 3)).after(None, (4, 4))
    assert held.lengths == (2, 3)


def test_reorders_follow_each_other() -> None:
    held = ReplicaProgress.all_of((5, 3, 4)).after((2, 0, 0), (4, 5, 1)).after((1, 2), (5, 1))
    assert held == ReplicaProgress((0, 0), (5, 1))


def test_rows_may_become_more() -> None:
    assert ReplicaProgress.nothing(1).after((0, 0), (3, 3)) == ReplicaProgress((0, 0), (0, 0))
