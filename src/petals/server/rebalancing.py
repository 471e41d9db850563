"""When a server should leave its blocks for others, and whose turn it is.

Servers decide alone, from pictures that are a little old, so the danger is not that nobody moves
but that everybody does. What keeps them calm: a margin the swarm's bottleneck must gain, a stay
before the next move, a finding that holds twice, and looks spread over time, rarer per server the
more servers there are. Chance comes from the peer id, time from the caller: values in, values out.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from petals.server.placement import Picture, Rates, choose_span, picture_of
from petals.swarm.records import ServerRecord, View
from petals.types import BlockSpan, PeerId, ServerState

WANTED_FOR_A_GAP = 3.0
"""How many may set out for blocks that nobody holds: a gap costs more than two spares do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy:
    """How eager servers are.

    ``margin``: by which part the weakest block must be able to gain. ``attainable``: how near to
    the even level a swarm is expected to come at all. Every server looks about once in
    ``look_seconds``, or less often in large swarms: once in ``seconds_between_looks`` somebody
    does. ``confirm_seconds`` after a finding it looks again, and moves if it still holds.
    ``min_stay_seconds`` is waived, and what is confirmed is confirmed in a third of the time, while
    a block is held by nobody.
    """

    margin: float = 0.15
    attainable: float = 0.98
    look_seconds: float = 60.0
    seconds_between_looks: float = 6.0
    confirm_seconds: float = 90.0
    min_stay_seconds: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a server stands between looks; times in seconds of the caller's clock.

    ``since``: online at its present blocks. ``next_look``: when to ask again. ``num_looks``
    counts; it feeds the draws. ``is_confirming``: the last look found a reason to move.
    """

    since: float
    next_look: float
    num_looks: int = 0
    is_confirming: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """A better span, and how many servers like this one should move there now."""

    blocks: BlockSpan
    num_wanted: float


def begin(me: PeerId, now: float, num_servers: int, policy: MovePolicy | None = None) -> Standing:
    """The standing of a server that has just come online among ``num_servers``."""
    policy = policy or MovePolicy()
    pause = _period(num_servers, policy) * draw(me, 0, "pause")
    return Standing(since=now, next_look=now + pause)


def should_move(
    view: View, me: PeerId, now: float, standing: Standing, policy: MovePolicy | None = None
) -> tuple[Standing, BlockSpan | None]:
    """Whether to leave for other blocks now, and the standing to come back with.

    ``view`` must be whole, not a sample. A span means: announce DRAINING, wait until others have
    heard it, ask ``may_leave`` with a new view, hand over, then join with the span; after a refusal
    stay. Nothing is decided before ``standing.next_look``, nor for a server that is not ONLINE.
    """
    record = view.records.get(me)
    if record is None or now < standing.next_look:
        return standing, None
    return look(picture_of(view), record, now, standing, policy or MovePolicy())


def look(
    picture: Picture, record: ServerRecord, now: float, standing: Standing, policy: MovePolicy
) -> tuple[Standing, BlockSpan | None]:
    """``should_move`` for somebody who has the picture already."""
    me, count = PeerId(record.peer_id), standing.num_looks + 1
    period = _period(picture.num_servers, policy)
    later = Standing(
        since=standing.since,
        next_look=now + period * (0.5 + draw(me, count, "pause")),
        num_looks=count,
    )
    if now - standing.since < policy.min_stay_seconds and picture.weakest > 0:
        return later, None
    move = find_move(picture, record, policy)
    if move is None:
        return later, None
    if standing.is_confirming:
        return later, move.blocks
    # Those who find the same before our move shows; together they should not move more than wanted.
    num_rivals = picture.num_servers * min(1.0, 2 * policy.confirm_seconds / period)
    if draw(me, count, "turn") * num_rivals >= move.num_wanted:
        return later, None
    pause = policy.confirm_seconds * (0.5 + draw(me, count, "pause"))
    soon = now + (pause if picture.weakest > 0 else pause / 3)
    confirming = Standing(since=standing.since, next_look=soon, num_looks=count, is_confirming=True)
    return confirming, None


def find_move(picture: Picture, record: ServerRecord, policy: MovePolicy) -> Move | None:
    """The move of this server that would help, if there is one; no chance and no time in it.

    It helps if the bottleneck gains the margin, at once or when as many others as needed do the
    same, if the blocks left behind stay above the bottleneck by the margin, and if somebody who is
    online holds each of them.
    """
    goal = policy.attainable * picture.level
    raised = (1 + policy.margin) * picture.weakest
    if record.state is not ServerState.ONLINE or raised > goal or goal <= 0:
        return None
    rest, throughput = picture.without(record), picture.throughput_of(record)
    length = sum(end - start for start, end in record.spans)
    blocks = choose_span(rest.worth, length)
    after = rest.worth_with(blocks, throughput)
    left = np.zeros(len(after), dtype=bool)
    for start, end in record.spans:
        left[start:end] = True
    left[blocks.start : blocks.end] = False
    if not left.any() or (rest.num_online[left] < 1).any() or (after[left] < raised).any():
        return None
    if not _is_better(after, picture.worth):
        return None
    if after.min() > raised:
        return Move(blocks, 1.0 if picture.weakest > 0 else WANTED_FOR_A_GAP)
    missing = float(np.maximum(goal - picture.worth, 0.0).sum())
    return Move(blocks, max(1.0, missing / throughput))


def may_leave(view: View, me: PeerId) -> bool:
    """Asked when DRAINING has been heard: is each of our blocks held by somebody who stays?

    ``view`` is read anew, later than our DRAINING could be read by others, and without servers that
    did not answer a ping: a dead one's record lives on for a while.
    Of several that drain at once none counts for the others, so no block is left uncovered.
    """
    record = view.records.get(me)
    spans = () if record is None else record.block_spans
    held = np.zeros(view.num_blocks, dtype=bool)
    for peer_id, other in view.records.items():
        if other.state is ServerState.ONLINE and peer_id != me:
            for start, end in other.spans:
                held[start:end] = True
    return all(bool(held[span.start : span.end].all()) for span in spans)


def draw(me: PeerId, count: int, purpose: str) -> float:
    """A number in [0, 1) that differs from server to server and from look to look."""
    digest = hashlib.blake2b(f"{me}/{count}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _period(num_servers: int, policy: MovePolicy) -> float:
    return max(policy.look_seconds, policy.seconds_between_looks * num_servers)


def _is_better(after: Rates, before: Rates) -> bool:
    """By the weakest block, then by the second weakest and so on; rounding does not count."""
    a, b = np.sort(after), np.sort(before)
    differs = np.flatnonzero(np.abs(a - b) > 1e-9 * max(1.0, float(b[-1])))
    return bool(len(differs)) and bool(a[differs[0]] > b[differs[0]])
