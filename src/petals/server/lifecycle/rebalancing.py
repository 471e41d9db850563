"""When a server should leave its blocks for others, and whose turn it is.

Servers decide alone, from pictures that are a little old, so the danger is not that nobody moves
but that everybody does. What keeps them calm: everybody works out the best move of everybody, and
whoever's is not the best waits its turn behind those that are better; by then their records say
where they go, and most reasons are gone. A move must gain much for the size of the server, a reason
must hold twice, and whoever has just come stays. Chance comes from the peer id, time from the
caller: values in, values out.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from petals.server.lifecycle.placement import Picture, length_of, offers_of, picture_of
from petals.server.policies import MovePolicy
from petals.swarm.directory.records import ServerRecord, View
from petals.types import BlockSpan, PeerId, ServerState


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
    """A better span, and how many other servers have a better move than this one.

    Of equals the one with the smallest peer id comes first.
    """

    blocks: BlockSpan
    num_better: float


def begin(me: PeerId, now: float, num_servers: int, policy: MovePolicy | None = None) -> Standing:
    """The standing of a server that has just come online among ``num_servers``."""
    policy = policy or MovePolicy()
    pause = _period(num_servers, policy) * draw(me, 0, "pause")
    return Standing(since=now, next_look=now + pause)


def should_move(
    view: View, me: PeerId, now: float, standing: Standing, policy: MovePolicy | None = None
) -> tuple[Standing, BlockSpan | None]:
    """Whether to leave for other blocks now, and the standing to come back with.

    ``view`` must be whole, not a sample. A span means: announce DRAINING with the span as
    ``next_spans``, wait until others have heard it, ask ``may_leave`` with a new view, hand over,
    then join with the span and without ``next_spans``; after a refusal say ONLINE, without them,
    too. Nothing is decided before ``standing.next_look``, nor for a server that is not ONLINE.
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
    period = _period(len(picture.servers), policy)
    later = Standing(
        since=standing.since,
        next_look=now + period * (0.5 + draw(me, count, "pause")),
        num_looks=count,
    )
    if now - standing.since < policy.min_stay_seconds and picture.served.all():
        return later, None
    move = find_move(picture, record, policy)
    if move is None:
        return later, None
    if standing.is_confirming:
        return later, move.blocks
    # Of those that are better, how many look before our move shows?
    num_before = move.num_better * min(1.0, policy.confirm_seconds / period)
    pause = policy.confirm_seconds + policy.turn_seconds * num_before
    if pause > policy.patience_seconds:
        return later, None
    pause *= 0.9 + 0.2 * draw(me, count, "pause")
    confirming = Standing(
        since=standing.since, next_look=now + pause, num_looks=count, is_confirming=True
    )
    return confirming, None


def find_move(picture: Picture, record: ServerRecord, policy: MovePolicy) -> Move | None:
    """The move of this server that would help, if there is one; no chance and no time in it.

    It helps while the swarm carries less than enough, if the weakest worth and what is carried both
    gain the margin for the part of the swarm that moves; see ``offers_of`` for who must stay.
    """
    if record.state is not ServerState.ONLINE or not picture.level:
        return None
    if picture.carried >= policy.enough:
        return None
    others = picture.offers
    mine = others.of(record) or offers_of(picture, (record,)).of(record)
    if mine is None:
        return None
    start, gain, part = mine
    blocks = BlockSpan(start, start + length_of(record.spans))
    if gain <= policy.margin * part:
        return None
    if picture.carried_if(record, blocks) <= picture.carried * (1.0 + policy.margin * part):
        return None
    is_equal = np.abs(others.gains - gain) <= 1e-6 * gain
    is_first = np.array([peer < record.peer_id for peer in others.peers], dtype=bool)
    is_better = np.where(is_equal, is_first, others.gains > gain)
    is_better &= others.gains > policy.margin * others.parts
    num_better = float(is_better.mean()) * len(picture.servers)
    return Move(blocks, num_better)


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
