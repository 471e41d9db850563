"""Which tokens a replay sends, and in which parts, as tables."""

import pytest

from petals.errors import BadInput, SessionGap
from petals.models.runtime.token_log import TokenLog
from petals.server.session.replay import ReplaySource, plan_replay
from petals.wire.header import RequestHeader
from petals.wire.requests import ReplayRequest

HEADER = RequestHeader(b"s" * 16, 2, 9)


def asked(lengths: tuple[int, ...], **changes: object) -> ReplayRequest:
    return ReplayRequest(HEADER, 5, lengths, (), **changes)


@pytest.mark.parametrize(
    ("wanted", "lengths", "reordered_by", "starts", "counts", "is_reordered"),
    [
        (asked((4, 6)), (4, 6), None, (0, 0), (4, 6), False),
        (asked((4, 6)), (9, 6), None, (0, 0), (4, 6), False),
        # The step to follow has been run here and has rolled row 1 back.
        (asked((4, 6)), (5, 2), None, (0, 0), (4, 2), False),
        (asked((4, 6)), (4, 6), 3, (0, 0), (4, 6), False),
        # It has reordered the rows here, and lengths are told as they were before.
        (asked((4, 6), reorder=(1, 0, 1)), (6, 4, 6), 5, (0, 0, 0), (6, 4, 6), True),
        (asked((4, 6), reorder=(1, 0)), (4, 6), None, (0, 0), (4, 6), False),
        (asked((4, 6), base_rows=(0, 0), starts=(3, 6)), (4, 6), None, (3, 6), (1, 0), False),
        (asked((4, 6), base_rows=(0, 1), starts=(4, 7)), (4, 6), None, (4, 7), (0, 0), False),
    ],
)
def test_what_is_sent(wanted, lengths, reordered_by, starts, counts, is_reordered) -> None:
    plan, found = plan_replay(wanted, lengths, reordered_by)
    assert (plan.starts, plan.counts, plan.reorder) == (starts, counts, wanted.base_rows)
    assert found == is_reordered


@pytest.mark.parametrize(
    ("wanted", "reordered_by", "error"),
    [
        (asked((4, 6)), 6, SessionGap),
        (asked((4,)), None, BadInput),
        (asked((4, 6, 8)), None, BadInput),
        (asked((4, 6), reorder=(2, 0)), 5, BadInput),
        (asked((4, 6), reorder=(0,)), 5, BadInput),
        (asked((4, 6), base_rows=(0, 1), starts=(0,)), None, BadInput),
        (asked((4, 6), base_rows=(0,), starts=(0, 0)), None, BadInput),
    ],
)
def test_what_cannot_be_sent(wanted, reordered_by, error) -> None:
    with pytest.raises(error) as caught:
        plan_replay(wanted, (4, 6), reordered_by)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [
        ((2, 3), 2, [((0, 0), (2, 0)), ((2, 0), (0, 2)), ((2, 2), (0, 1))]),
        ((2, 3), 5, [((0, 0), (2, 3))]),
        ((0, 0), 5, [((0, 0), (0, 0))]),
    ],
)
def test_parts_follow_each_other_and_the_last_one_ends(lengths, max_tokens, parts) -> None:
    request = asked(lengths)
    plan, _ = plan_replay(request, lengths, None)
    source = ReplaySource(request, plan, False, TokenLog(2), None)
    found = list(source.parts(max_tokens))
    assert [(part.starts, part.counts) for part in found] == parts
    assert [part.index for part in found] == list(range(len(parts)))
    assert [part.ends for part in found] == [False] * (len(parts) - 1) + [True]
    assert [part.reorder for part in found] == [(0, 0)] + [None] * (len(parts) - 1)
    assert {part.header for part in found} == {HEADER}
