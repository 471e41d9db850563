"""What repair and migration do to a route: reserve other hops, book losses, switch over.

Knows servers and reservations; decides nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from petals.client.routing.bans import Cause
from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.session.actions import LegStatus
from petals.client.session.context import SessionContext
from petals.client.session.hop import HopSession
from petals.client.session.reservation import ReplacementHints, release, reserve_route
from petals.errors import PetalsError
from petals.types import BlockSpan, PeerId


def peer_before(context: SessionContext, old: Sequence[HopSession]) -> PeerId | None:
    """The server before these legs; None if the client is."""
    start = context.state.legs.index(old[0])
    return context.state.legs[start - 1].peer_id if start else None


async def reserve(
    context: SessionContext,
    old: Sequence[HopSession],
    num_rows: int,
    hints: ReplacementHints | None,
) -> list[HopSession]:
    """Hops for the blocks of ``old`` legs (none: for all blocks) in the present epoch. They join
    the session. Raises what ``reserve_route`` raises.
    """
    state, blocks = context.state, context.state.blocks
    if old:
        blocks = BlockSpan(old[0].blocks.start, old[-1].blocks.end)
    spec = replace(context.spec, num_rows=num_rows, epoch=state.epoch)
    hops = await reserve_route(context.swarm, blocks, spec, context.replies, hints)
    state.joining += hops
    return hops


async def switch(
    context: SessionContext, old: Sequence[HopSession], hops: Sequence[HopSession]
) -> None:
    """Let ``hops`` take the place of ``old`` legs, and free these."""
    context.state.switch(old, hops)
    if old:
        context.swarm.node.background.start(release(old), "freeing replaced hops")
    await context.state.announce_epoch()


def drop(context: SessionContext, hops: Sequence[HopSession]) -> None:
    """Free hops that do not take part after all."""
    context.state.joining = [hop for hop in context.state.joining if hop not in hops]
    if hops:
        context.swarm.node.background.start(release(hops), "freeing unused hops")


def book(
    context: SessionContext, hops: Iterable[HopSession], excluded: dict[PeerId, PetalsError]
) -> None:
    """Enter the losses among ``hops``, once each: ban servers, or add them to ``excluded``, as the
    failure policy says, and remember what is to be repaired.
    """
    state, step = context.state, context.state.step
    for hop in hops:
        error = hop.state.error
        if error is None or hop.state.is_booked:
            continue
        history = History(holds_state=True) if step is None else step.history
        decision = decide(error, history)
        if decision.cause is not None:
            is_slow = hop.state.status is LegStatus.SLOW
            cause = Cause.SLOW if is_slow else decision.cause
            context.swarm.note_failure(hop.peer_id, error, cause)
        if decision.reaction is Reaction.EXCLUDE:
            excluded[hop.peer_id] = error
        if step is not None:
            step.history, step.last_error = history.after(error, decision), error
        if hop in state.legs:
            state.losses[hop.hop] = error.message
        hop.book()
