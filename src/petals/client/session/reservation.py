"""Changing a session's hops: reserve a route or a part of one, switch over, free, book losses.

No hop is held while another one is waited for: all are asked without waiting; on a refusal all are
released, and only then another route is taken, or a full server is waited for. Knows servers and
reservations; knows no rows, no positions and no tokens.
"""

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from petals.client.routing.bans import Cause
from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.routing.route import Needs
from petals.client.session.actions import LegStatus
from petals.client.session.context import SessionContext
from petals.client.session.hop import HopSession
from petals.client.session.types import HopNeighbours, HopTimeouts, SessionSpec
from petals.errors import CacheFull, NoCapacity, PetalsError, UnknownAdapter
from petals.logs import get_logger
from petals.types import BlockSpan, Hop, PeerId, Route

logger = get_logger(__name__)


async def release(hops: Sequence[HopSession]) -> None:
    """Free reservations, all at the same time. A caller that is cancelled meanwhile stops waiting;
    the reservations are freed all the same.
    """
    closing = [asyncio.create_task(hop.close(), name="freeing a hop") for hop in hops]
    if closing:
        await asyncio.wait(closing)


@dataclass(frozen=True, slots=True)
class ReplacementHints:
    """What is reserved takes the place of other hops, behind the server ``before``.

    excluded: servers that refused the request, and their refusals. unfit: servers that cannot take
    the session for other reasons. kv_donors: servers that still hold exactly these blocks and can
    send their keys and values to the replacement.
    """

    before: PeerId | None = None
    excluded: Mapping[PeerId, PetalsError] = field(default_factory=dict)
    unfit: frozenset[PeerId] = frozenset()
    kv_donors: Mapping[BlockSpan, PeerId] = field(default_factory=dict)


async def reserve(
    context: SessionContext,
    old: Sequence[HopSession],
    num_rows: int,
    hints: ReplacementHints | None,
) -> list[HopSession]:
    """Hops for the blocks of ``old`` legs (none: for all blocks) in the present epoch. They join
    the session.

    A replacement (with ``hints``) never calls a server that is banned, and goes on until no server
    is left. Raises MissingBlocksError, CacheFull after ``alloc_timeout``, the last refusal if all
    servers have refused, and, unless it is a replacement, a PeerError after ``max_retries``.
    """
    state, blocks = context.state, context.state.blocks
    if old:
        blocks = BlockSpan(old[0].blocks.start, old[-1].blocks.end)
    spec = replace(context.spec, num_rows=num_rows, epoch=state.epoch)
    hops = await _RouteReservation(context, blocks, spec, hints).run()
    for hop in hops:
        context.swarm.note_success(hop.peer_id, hop.info)
    state.joining += hops
    return hops


def peer_before(context: SessionContext, old: Sequence[HopSession]) -> PeerId | None:
    """The server before these legs; None if the client is."""
    start = context.state.legs.index(old[0])
    return context.state.legs[start - 1].peer_id if start else None


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


class _RouteReservation:
    """One attempt after another, with what they have taught."""

    def __init__(
        self,
        context: SessionContext,
        blocks: BlockSpan,
        spec: SessionSpec,
        hints: ReplacementHints | None,
    ) -> None:
        swarm, config = context.swarm, context.config
        self._swarm = swarm
        self._spec = spec
        self._replies = context.replies
        self._is_replacement = hints is not None
        self._hints = hints or ReplacementHints()
        self._needs = Needs(blocks=blocks, model=swarm.model, cache_tokens=spec.cache_tokens)
        self._room_deadline = swarm.node.clock.monotonic() + config.alloc_timeout
        self._full: set[PeerId] = set()
        self._refused = dict(self._hints.excluded)
        limit = None if self._is_replacement else config.num_retries
        self._history = History(max_failures=limit)

    async def run(self) -> list[HopSession]:
        while True:
            held: list[HopSession] = []
            crowded = False
            try:
                route = await self._route(exclude_full=True)
            except NoCapacity:
                crowded = True
                route = await self._route(exclude_full=False)
                held = await self._wait_for_room(route)
            if held or not crowded:
                hops = await self._reserve(route, held)
                if hops is not None:
                    return hops
            if crowded:  # two clients on crossed routes must not retry in step for ever
                jitter = self._swarm.config.failover.jitter_seconds
                await self._swarm.node.clock.sleep(random.random() * jitter)

    async def _route(self, *, exclude_full: bool) -> Route:
        exclude = self._hints.unfit | self._refused.keys()
        if exclude_full:
            exclude |= self._full
        try:
            needs = replace(self._needs, exclude=exclude)
            return await self._swarm.route(needs, is_repair=self._is_replacement)
        except NoCapacity:
            if self._refused and not exclude_full:
                raise next(reversed(self._refused.values())) from None
            raise

    async def _wait_for_room(self, route: Route) -> list[HopSession]:
        """Wait at one full server, holding nothing elsewhere. Raises CacheFull at the deadline."""
        full = next((hop for hop in route if hop.peer_id in self._full), None)
        if full is None:
            return []
        seconds = self._room_deadline - self._swarm.node.clock.monotonic()
        if seconds <= 0:
            waited = self._swarm.config.alloc_timeout
            raise CacheFull(
                f"The servers of blocks {full.blocks} have had no free cache for {waited:g} s.",
                peer_id=full.peer_id,
            )
        try:
            held = await self._open(full, route, alloc_seconds=seconds)
        except PetalsError as error:
            await self._react(full, error)
            return []
        self._full.discard(full.peer_id)
        return [held]

    async def _reserve(self, route: Route, held: list[HopSession]) -> list[HopSession] | None:
        """Ask all hops not ``held``, without waiting; None, and nothing held, if one refuses."""
        have = {session.hop: session for session in held}
        missing = [hop for hop in route if hop not in have]
        tasks = [asyncio.create_task(self._open(hop, route)) for hop in missing]
        try:
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:
            # Not here: who is cancelled once may be cancelled twice.
            work = _give_up(tasks, held)
            self._swarm.node.background.start(work, "freeing hops that nobody waits for")
            raise
        errors = [(hop, task.exception()) for hop, task in zip(missing, tasks) if task.exception()]
        if not errors:
            have |= {hop: task.result() for hop, task in zip(missing, tasks)}
            return [have[hop] for hop in route]
        await release([*held, *_opened(tasks)])
        for hop, error in errors:
            if not isinstance(error, PetalsError):
                raise error or RuntimeError
            await self._react(hop, error)
        return None

    async def _open(self, hop: Hop, route: Route, alloc_seconds: float = 0.0) -> HopSession:
        index, hints = route.index(hop), self._hints
        before, after = hints.before, None
        if index:
            before = route[index - 1].peer_id
        if self._swarm.config.use_server_to_server and hop is not route[-1]:
            after = route[index + 1].peer_id
        neighbours = HopNeighbours(before, after, hints.kv_donors.get(hop.blocks))
        node, spec, config = self._swarm.node, self._spec, self._swarm.config
        timeouts = HopTimeouts(
            connect_seconds=self._swarm.connect_seconds(hop.peer_id),
            request_seconds=config.request_timeout,
            alloc_seconds=alloc_seconds,
            silence_seconds=config.silence_timeout,
            close_seconds=config.failover.close_seconds,
        )
        adapter = None if spec.tuning.adapter is None else spec.tuning.adapter.within(hop.blocks)
        parts = (node, hop, spec, timeouts, neighbours, self._replies)
        if adapter is None:
            return await HopSession.open(*parts)
        await self._swarm.adapters.deliver(hop.peer_id, adapter)
        try:
            return await HopSession.open(*parts)
        except UnknownAdapter:
            await self._swarm.adapters.deliver(hop.peer_id, adapter, again=True)
            return await HopSession.open(*parts)

    async def _react(self, hop: Hop, error: PetalsError) -> None:
        """Follow the failure policy. Raises the error if no other server can help."""
        logger.debug("blocks %s at %s: %s", hop.blocks, hop.peer_id, error.message)
        peer, swarm = hop.peer_id, self._swarm
        error.peer_id = error.peer_id or peer
        decision = decide(error, self._history)
        self._history = self._history.after(error, decision)
        if decision.cause is not None:
            swarm.note_failure(peer, error, decision.cause)
        match decision.reaction:
            case Reaction.EXCLUDE if isinstance(error, CacheFull):
                self._full.add(peer)
            case Reaction.EXCLUDE:
                self._refused[peer] = error
            case Reaction.BAN if not self._is_replacement:
                pause = swarm.config.backoff_seconds(self._history.num_failures)
                await swarm.node.clock.sleep(pause)
            case Reaction.RAISE | Reaction.WAIT:
                raise error
        if decision.refresh:
            await swarm.refresh()


async def _give_up(tasks: Sequence["asyncio.Task[HopSession]"], held: Sequence[HopSession]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await release([*held, *_opened(tasks)])


def _opened(tasks: Sequence["asyncio.Task[HopSession]"]) -> list[HopSession]:
    return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
