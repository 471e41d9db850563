"""Reserving hops for a session: a whole route, or replacements for a part of one.

No hop is held while another one is waited for: all are asked without waiting; on a refusal all are
released, and only then another route is taken, or a full server is waited for. Knows servers and
reservations; knows no rows, no positions and no tokens.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.routing.route import Needs
from petals.client.session.hop import HopSession
from petals.client.session.pipeline import SessionContext
from petals.client.session.types import ForkPoint
from petals.errors import CacheFull, NoCapacity, PetalsError
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


async def reserve(
    context: SessionContext,
    old: Sequence[HopSession],
    num_rows: int,
    excluded: Mapping[PeerId, PetalsError] | None,
    unfit: frozenset[PeerId] = frozenset(),
    kv_donors: Sequence[HopSession] = (),
) -> list[HopSession]:
    """Hops for the blocks of ``old`` legs (none: for all blocks) in the present epoch. They join
    the session.

    excluded: servers that refused the request, and their refusals; None: what is reserved is the
    session's first route. Anything else is a replacement: it never calls a server that is banned,
    and goes on until no server is left. unfit: servers that cannot take the session for other
    reasons. kv_donors: legs that can send keys and values to a replacement of the same blocks.

    Raises MissingBlocksError, CacheFull after ``alloc_timeout``, the last refusal if all servers
    have refused, and for a first route a PeerError after ``max_retries``.
    """
    hops = await _RouteReservation(context, old, num_rows, excluded, unfit, kv_donors).run()
    for hop in hops:
        context.swarm.note_success(hop.peer_id, hop.info)
    context.state.joining += hops
    return hops


async def reserve_forks(
    context: SessionContext, legs: Sequence[HopSession], lengths: tuple[int, ...]
) -> list[HopSession]:
    """Hops beside the ``legs`` of another session, at the same servers, that begin with the first
    ``lengths[r]`` tokens of its rows. They join the session of ``context``. None of them, if one of
    the servers cannot do that: it refuses, or is lost.
    """
    if any(leg.state.is_lost for leg in legs):
        return []
    attempt = _RouteReservation(context, (), len(lengths), {}, frozenset(), ())
    attempt.forks = {leg.hop: ForkPoint(leg.session_id, lengths) for leg in legs}
    try:
        hops = await attempt.reserve(tuple(attempt.forks), [])
    except PetalsError as error:
        logger.debug("a session is not forked: %s", error.message)
        return []
    context.state.joining += hops or []
    return hops or []


class _RouteReservation:
    """Attempts one after the other, and which servers they have found full or unwilling."""

    def __init__(
        self,
        context: SessionContext,
        old: Sequence[HopSession],
        num_rows: int,
        excluded: Mapping[PeerId, PetalsError] | None,
        unfit: frozenset[PeerId],
        kv_donors: Sequence[HopSession],
    ) -> None:
        state, swarm, blocks = context.state, context.swarm, context.state.blocks
        self._before: PeerId | None = None
        """The server before ``old``; None if the client is."""
        if old:
            blocks = BlockSpan(old[0].blocks.start, old[-1].blocks.end)
            start = state.legs.index(old[0])
            self._before = state.legs[start - 1].peer_id if start else None
        self._context = context
        self._swarm = swarm
        self._config = swarm.config
        self._clock = swarm.node.clock
        self._spec = replace(context.spec, num_rows=num_rows, epoch=state.epoch)
        self._needs = Needs(blocks=blocks, model=swarm.model, cache_tokens=self._spec.cache_tokens)
        self._room_deadline = self._clock.monotonic() + self._config.alloc_timeout
        self._is_replacement = excluded is not None
        self._full: frozenset[PeerId] = frozenset()
        self._refused = dict(excluded or {})
        self._unfit, self._kv_donors = unfit, kv_donors
        self.forks: Mapping[Hop, ForkPoint] = {}
        """What hops begin with; a hop that is not named begins with nothing."""
        limit = None if self._is_replacement else self._config.num_retries
        self._history = History(max_failures=limit)

    async def run(self) -> list[HopSession]:
        while True:
            held: list[HopSession] = []
            crowded = False
            try:
                route = await self._route(self._full)
            except NoCapacity:
                crowded = True
                try:
                    route = await self._route(frozenset())
                except NoCapacity as error:
                    raise next(reversed(self._refused.values()), error) from None
                held = await self._wait_for_room(route)
            if held or not crowded:
                hops = await self.reserve(route, held)
                if hops is not None:
                    return hops
            if crowded:  # two clients on crossed routes must not retry in step for ever
                await self._clock.sleep(random.random() * self._config.failover.jitter_seconds)

    async def _route(self, full: frozenset[PeerId]) -> Route:
        needs = replace(self._needs, exclude=self._unfit | self._refused.keys() | full)
        return await self._swarm.route(needs, is_repair=self._is_replacement)

    async def _wait_for_room(self, route: Route) -> list[HopSession]:
        """Wait at one full server, holding nothing elsewhere. Raises CacheFull at the deadline."""
        full = next((hop for hop in route if hop.peer_id in self._full), None)
        if full is None:
            return []
        seconds = self._room_deadline - self._clock.monotonic()
        if seconds <= 0:
            waited = self._config.alloc_timeout
            raise CacheFull(
                f"The servers of blocks {full.blocks} have had no free cache for {waited:g} s.",
                peer_id=full.peer_id,
            )
        try:
            held = await self._open(full, route, alloc_seconds=seconds)
        except PetalsError as error:
            await self._react(full, error)
            return []
        self._full -= {full.peer_id}
        return [held]

    async def reserve(self, route: Route, held: list[HopSession]) -> list[HopSession] | None:
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
            self._swarm.node.background.start(work, "freeing hops of an attempt that was cancelled")
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
        context, index = self._context, route.index(hop)
        before, after = route[index - 1].peer_id if index else self._before, None
        if self._config.use_server_to_server and hop is not route[-1]:
            after = route[index + 1].peer_id
        donors = [leg.peer_id for leg in self._kv_donors if leg.blocks == hop.blocks]
        sources = [*([] if before is None else [before]), *donors]
        spec = replace(self._spec, alloc_seconds=alloc_seconds, fork=self.forks.get(hop))
        opened = partial(
            HopSession.open, self._swarm, hop, spec, sources, after, context.on_draining
        )
        adapter = spec.tuning.adapter_of(hop.blocks)
        return await self._swarm.adapters.use(hop.peer_id, adapter, opened)

    async def _react(self, hop: Hop, error: PetalsError) -> None:
        """Follow the failure policy. Raises the error if no other server can help."""
        logger.debug("blocks %s at %s: %s", hop.blocks, hop.peer_id, error.message)
        error.peer_id = error.peer_id or hop.peer_id
        decision = decide(error, self._history)
        self._history = self._history.after(error, decision)
        if decision.cause is not None:
            self._swarm.note_failure(hop.peer_id, error, decision.cause)
        match decision.reaction:
            case Reaction.EXCLUDE if isinstance(error, CacheFull):
                self._full |= {hop.peer_id}
            case Reaction.EXCLUDE:
                self._refused[hop.peer_id] = error
            case Reaction.BAN if not self._is_replacement:
                await self._clock.sleep(self._config.backoff_seconds(self._history.num_failures))
            case Reaction.RAISE | Reaction.WAIT:
                raise error
        if decision.refresh:
            await self._swarm.refresh()


async def _give_up(tasks: Sequence["asyncio.Task[HopSession]"], held: Sequence[HopSession]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await release([*held, *_opened(tasks)])


def _opened(tasks: Sequence["asyncio.Task[HopSession]"]) -> list[HopSession]:
    return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
