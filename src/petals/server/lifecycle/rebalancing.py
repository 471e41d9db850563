"""When a server should leave its blocks for others, and in which order servers move.

Servers decide alone, from views that are some seconds old, so the danger is that all of them see
the same gap and move there at once. Four rules prevent it. Every server computes the best moves of
all servers from the same view; a server whose move is not the best waits one turn for each better
move, and sees by then in the others' records where they go. A move must gain much for the size of
the server. A reason to move must hold at two looks in a row. A server that has just come stays. The
random numbers are hashes of the peer id, the time is an argument: values in, values out.

A block without any server stops the whole swarm, so a server looks for such a block more often, and
all waiting times are shorter while there is one.
"""

import hashlib
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from petals.server.lifecycle.placement import Coverage, best_moves_of, coverage_of, length_of
from petals.server.policies import MovePolicy
from petals.swarm.directory.records import ServerRecord, View
from petals.types import BlockSpan, PeerId, ServerState


class MoveReason(StrEnum):
    """Why blocks need a server: they have none, or too little throughput."""

    GAP = "gap"
    LOAD = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverState:
    """What a server remembers between two looks; times in seconds of the caller's clock.

    since: when it came online at its present blocks. next_look: when to look again. load_due: when
    load becomes a reason again; looks before that only notice gaps. num_looks: number of looks, an
    input of ``draw``. confirming: the reason to move that an earlier look has found.
    """

    since: float
    next_look: float
    load_due: float = 0.0
    num_looks: int = 0
    confirming: MoveReason | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A better span, and the number of other servers that have a better move than this one.

    Of equal moves that of the smallest peer id counts as better.
    """

    blocks: BlockSpan
    num_better: float


def begin(me: PeerId, now: float, num_servers: int, policy: MovePolicy | None = None) -> MoverState:
    """The state of a server that has just come online in a swarm of ``num_servers``."""
    policy = policy or MovePolicy()
    pause = _period(num_servers, policy) * draw(me, 0, "pause")
    glance = _glance(num_servers, policy) * draw(me, 0, "glance")
    return MoverState(since=now, next_look=now + min(pause, glance), load_due=now + pause)


def should_move(
    view: View, me: PeerId, now: float, state: MoverState, policy: MovePolicy | None = None
) -> tuple[MoverState, BlockSpan | None]:
    """The state after a look, and the blocks to move to now, if any.

    ``view`` must be whole, not a sample. To move: announce DRAINING with the blocks as
    ``next_spans``, wait until other servers have read it, ask ``may_leave`` with a new view, drain,
    then join at the blocks without ``next_spans``. If ``may_leave`` is false, announce ONLINE
    without ``next_spans``. Nothing is decided before ``state.next_look``, nor for a server that is
    not ONLINE.
    """
    record = view.records.get(me)
    if record is None or now < state.next_look:
        return state, None
    return look(coverage_of(view), record, now, state, policy or MovePolicy())


def look(
    coverage: Coverage, record: ServerRecord, now: float, state: MoverState, policy: MovePolicy
) -> tuple[MoverState, BlockSpan | None]:
    """``should_move`` for a caller that has the coverage and the record of the server already."""
    me, count, num_servers = PeerId(record.peer_id), state.num_looks + 1, len(coverage.servers)
    reason = MoveReason.LOAD if coverage.served.all() else MoveReason.GAP
    period, glance = _period(num_servers, policy), _glance(num_servers, policy)
    is_due, glance_at = now >= state.load_due, now + glance * (0.5 + draw(me, count, "glance"))
    if not is_due and (reason is MoveReason.LOAD or state.confirming is MoveReason.GAP):
        waiting = replace(state, next_look=min(state.load_due, glance_at), num_looks=count)
        return waiting, None
    load_due = now + period * (0.5 + draw(me, count, "pause"))
    later = MoverState(
        since=state.since,
        next_look=min(load_due, glance_at),
        load_due=load_due,
        num_looks=count,
    )
    if now - state.since < policy.min_stay_seconds and reason is MoveReason.LOAD:
        return later, None
    move = find_move(coverage, record, policy)
    if move is None:
        return later, None
    if state.confirming is reason and is_due:
        return later, move.blocks
    is_gap = reason is MoveReason.GAP
    longest = max(policy.gap_seconds, glance) if is_gap else policy.look_seconds
    confirm_seconds = min(policy.confirm_seconds, longest)
    # Servers with a better move that look before this server would move.
    num_before = move.num_better * min(1.0, confirm_seconds / (glance if is_gap else period))
    pause = confirm_seconds + min(policy.turn_seconds, longest) * num_before
    if pause > policy.patience_seconds:
        return later, None
    due = now + pause * (0.9 + 0.2 * draw(me, count, "pause"))
    confirming = replace(
        later,
        # A gap that appears meanwhile does not wait for its turn in what is confirmed here.
        next_look=due if is_gap else min(due, glance_at),
        load_due=due,
        confirming=reason,
    )
    return confirming, None


def find_move(coverage: Coverage, record: ServerRecord, policy: MovePolicy) -> Move | None:
    """The best move of this server if it helps, whatever the time.

    It helps while the swarm carries less than ``policy.enough``, if both the soft minimum of the
    dependable throughput and the carried share grow by more than ``policy.margin`` times the
    server's part of the throughput. See ``best_moves_of`` for servers that must stay.
    """
    if record.state is not ServerState.ONLINE or not coverage.level:
        return None
    if coverage.carried >= policy.enough:
        return None
    others = coverage.best_moves
    mine = others.of(record) or best_moves_of(coverage, (record,)).of(record)
    if mine is None:
        return None
    start, gain, part = mine
    blocks = BlockSpan(start, start + length_of(record.spans))
    if gain <= policy.margin * part:
        return None
    if coverage.carried_if(record, blocks) <= coverage.carried * (1.0 + policy.margin * part):
        return None
    is_equal = np.abs(others.gains - gain) <= 1e-6 * gain
    is_first = np.array([peer < record.peer_id for peer in others.peers], dtype=bool)
    is_better = np.where(is_equal, is_first, others.gains > gain)
    is_better &= others.gains > policy.margin * others.parts
    num_better = float(is_better.mean()) * len(coverage.servers)
    return Move(blocks, num_better)


def may_leave(view: View, me: PeerId) -> bool:
    """Whether each block of ``me`` is held by another server that is ONLINE.

    Ask with a view read after the other servers have read our DRAINING, and without servers that
    did not answer a ping, since the record of a dead server lives on until it expires. Of several
    servers that drain at the same time none counts for the others, so no block loses all of them.
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
    """A pseudo-random number in [0, 1), different for each server and look."""
    digest = hashlib.blake2b(f"{me}/{count}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _period(num_servers: int, policy: MovePolicy) -> float:
    return max(policy.look_seconds, policy.seconds_between_looks * num_servers)


def _glance(num_servers: int, policy: MovePolicy) -> float:
    """Mean time (s) between two looks for gaps."""
    seconds = min(policy.look_seconds, policy.gap_seconds)
    return max(seconds, policy.seconds_between_looks * num_servers)
