"""Reserving a whole route, or a part of one.

Opening never holds one hop while it waits at another: all are asked without waiting; on a refusal
all are released, and only then another route is taken, or the full one waited for. Knows servers
and reservations; knows no rows, no positions and no tokens.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from petals.client.routing.bans import Cause
from petals.client.routing.route import Needs
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession
from petals.client.session.types import HopNeighbours, HopTimeouts, SessionSpec
from petals.errors import (
    BadInput,
    BlocksNotServed,
    CacheFull,
    NoCapacity,
    PeerError,
    PetalsError,
    RequestError,
    UnknownAdapter,
)
from petals.logs import get_logger
from petals.types import BlockSpan, Hop, PeerId, Route

logger = get_logger(__name__)

_MAX_JITTER_SECONDS = 0.1


async def release(hops: Sequence[HopSession]) -> None:
    """Free reservations, all at the same time."""
    await asyncio.gather(*(hop.close() for hop in hops))


@dataclass(frozen=True, slots=True)
class ReplacementHints:
    """What is opened takes the place of hops that are lost or will be, behind ``before``.

    ``unfit``: servers that cannot take the session. ``kv_donors``: servers that still hold exactly
    these blocks and can send their keys and values to the replacement.
    """

    before: PeerId | None = None
    unfit: frozenset[PeerId] = frozenset()
    kv_donors: Mapping[BlockSpan, PeerId] = field(default_factory=dict)


async def reserve_route(
    swarm: SwarmState, blocks: BlockSpan, terms: SessionSpec, repair: ReplacementHints | None = None
) -> list[HopSession]:
    """Reserve a route through ``blocks``.

    A repair never calls on a server that is banned, and goes on until nobody is left. Raises
    MissingBlocksError, CacheFull after ``alloc_timeout``, the refusal of the last server that could
    have served (RequestTooLarge, UnknownAdapter, ...), and, unless it is a repair, a PeerError
    after ``max_retries``.
    """
    hops = await _RouteReservation(swarm, blocks, terms, repair).run()
    for hop in hops:
        swarm.note_success(hop.peer_id, hop.info)
    return hops


class _RouteReservation:
    """One attempt after another, with what they have taught."""

    def __init__(
        self,
        swarm: SwarmState,
        blocks: BlockSpan,
        terms: SessionSpec,
        repair: ReplacementHints | None,
    ) -> None:
        config = swarm.config
        self._swarm = swarm
        self._terms = terms
        self._repair = repair
        self._needs = Needs(
            blocks=blocks,
            model=swarm.model,
            cache_tokens=terms.cache_tokens,
        )
        self._room_deadline = monotonic() + config.alloc_timeout
        self._full: dict[PeerId, CacheFull] = {}
        self._unfit: dict[PeerId, PetalsError] = {}
        self._num_failures = 0

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
                await asyncio.sleep(random.random() * _MAX_JITTER_SECONDS)

    async def _route(self, *, exclude_full: bool) -> Route:
        exclude = {*self._unfit, *self._full} if exclude_full else {*self._unfit}
        if self._repair is not None:
            exclude |= self._repair.unfit
        try:
            needs = replace(self._needs, exclude=frozenset(exclude))
            return await self._swarm.route(needs, is_repair=self._repair is not None)
        except NoCapacity:
            if self._unfit and not exclude_full:
                raise next(reversed(self._unfit.values())) from None
            raise

    async def _wait_for_room(self, route: Route) -> list[HopSession]:
        """Wait at one full server, holding nothing elsewhere. Raises CacheFull at the deadline."""
        full = next((hop for hop in route if hop.peer_id in self._full), None)
        if full is None:
            return []
        seconds = self._room_deadline - monotonic()
        if seconds <= 0:
            raise self._full[full.peer_id]
        try:
            held = await self._open(full, route, alloc_seconds=seconds)
        except PetalsError as error:
            await self._learn(full, error)
            return []
        del self._full[full.peer_id]
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
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await release([*held, *_opened(tasks)])
            raise
        errors = [(hop, task.exception()) for hop, task in zip(missing, tasks) if task.exception()]
        if not errors:
            have |= {hop: task.result() for hop, task in zip(missing, tasks)}
            return [have[hop] for hop in route]
        await release([*held, *_opened(tasks)])
        for hop, error in errors:
            if not isinstance(error, PetalsError):
                raise error or RuntimeError
            await self._learn(hop, error)
        return None

    async def _open(self, hop: Hop, route: Route, alloc_seconds: float = 0.0) -> HopSession:
        index, repair = route.index(hop), self._repair or ReplacementHints()
        before, after = repair.before, None
        if index:
            before = route[index - 1].peer_id
        if self._swarm.config.use_server_to_server and hop is not route[-1]:
            after = route[index + 1].peer_id
        neighbours = HopNeighbours(before, after, repair.kv_donors.get(hop.blocks))
        node, terms, config = self._swarm.node, self._terms, self._swarm.config
        patience = HopTimeouts(
            connect_seconds=self._swarm.connect_seconds(hop.peer_id),
            request_seconds=config.request_timeout,
            alloc_seconds=alloc_seconds,
            silence_seconds=config.silence_timeout,
        )
        adapter = None if terms.tuning.adapter is None else terms.tuning.adapter.within(hop.blocks)
        if adapter is None:
            return await HopSession.open(node, hop, terms, patience, neighbours)
        await self._swarm.adapters.deliver(hop.peer_id, adapter)
        try:
            return await HopSession.open(node, hop, terms, patience, neighbours)
        except UnknownAdapter:
            await self._swarm.adapters.deliver(hop.peer_id, adapter, again=True)
            return await HopSession.open(node, hop, terms, patience, neighbours)

    async def _learn(self, hop: Hop, error: PetalsError) -> None:
        """Remember why a server is no choice now. Raises the error if no other can help."""
        logger.debug("blocks %s at %s: %s", hop.blocks, hop.peer_id, error.message)
        match error:
            case CacheFull():
                self._full[hop.peer_id] = error
            case BadInput():
                raise error
            case BlocksNotServed():
                self._unfit[hop.peer_id] = error
                await self._swarm.refresh()
            case RequestError():
                self._unfit[hop.peer_id] = error
            case PeerError():
                self._swarm.note_failure(hop.peer_id, error, Cause.UNANSWERED)
                if self._repair is not None:
                    return
                self._num_failures += 1
                if self._num_failures > self._swarm.config.num_retries:
                    raise error
                await asyncio.sleep(self._swarm.config.backoff_seconds(self._num_failures))
            case _:
                raise error


def _opened(tasks: Sequence["asyncio.Task[HopSession]"]) -> list[HopSession]:
    return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
