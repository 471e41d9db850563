"""The hops of one session, opened together and walked in order.

Opening never holds one hop while it waits at another: all are asked without waiting; on a refusal
all are released, and only then another route is taken, or the full one waited for. Knows servers
and reservations; knows no rows, no positions and no tokens.
"""

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

from torch import Tensor

from petals.client.hop import HopSession, Patience, StepCall, Terms
from petals.client.routing import Needs
from petals.client.swarm_view import SwarmView
from petals.errors import (
    BadInput,
    BlocksNotServed,
    CacheFull,
    NoCapacity,
    PeerError,
    PetalsError,
    RequestError,
)
from petals.logs import get_logger
from petals.types import BlockSpan, Hop, PeerId, Route

logger = get_logger(__name__)

_SIGNS_PER_LEASE = 3
_MIN_SIGN_SECONDS = 0.05
_MAX_JITTER_SECONDS = 0.1


class SessionPath:
    """Reservations that lead through all blocks of a session. ``open_path`` makes one."""

    def __init__(self, hops: Sequence[HopSession], swarm: SwarmView) -> None:
        self.hops = tuple(hops)
        self._swarm = swarm
        self._keeper = asyncio.create_task(self._keep_alive(), name="signs of life")
        self._closed = False

    @property
    def route(self) -> Route:
        return tuple(hop.hop for hop in self.hops)

    @property
    def max_length(self) -> int:
        """Tokens per row that every hop has granted."""
        return min(hop.max_length for hop in self.hops)

    @property
    def max_step_tokens(self) -> int:
        """Tokens the smallest hop takes in one step; 0 if none of them has a limit."""
        limits = [hop.info.max_batch_tokens for hop in self.hops]
        return min((limit for limit in limits if limit), default=0)

    @property
    def hidden_size(self) -> int:
        """Width of the states, as the first server says."""
        return self.hops[0].info.hidden_size

    @property
    def lost_reorder(self) -> bool:
        """True if a step that reordered rows failed at some hop, nobody knows how far."""
        return any(hop.lost_reorder for hop in self.hops)

    async def step(self, call: StepCall, hidden: Tensor) -> Tensor:
        """``[sum(counts), H]`` through all hops. Raises what ``HopSession.step`` raises."""
        for hop in self.hops:
            try:
                hidden = await hop.step(call, hidden)
            except PeerError as error:
                self._swarm.note_failure(hop.peer_id, error)
                raise
        return hidden

    def note_reorder(self, rows: Sequence[int]) -> None:
        """New row r continues old row ``rows[r]``; every hop is told with its next step."""
        for hop in self.hops:
            hop.note_reorder(rows)

    async def close(self) -> None:
        """Free all reservations. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._keeper.cancel()
        self._swarm.paths.discard(self)
        await release(self.hops)

    async def _keep_alive(self) -> None:
        lease = min(hop.lease_seconds for hop in self.hops)
        pause = max(lease / _SIGNS_PER_LEASE, _MIN_SIGN_SECONDS)
        while True:
            await asyncio.sleep(pause)
            await asyncio.gather(*(_sign_of_life(hop) for hop in self.hops))


async def _sign_of_life(hop: HopSession) -> None:
    with contextlib.suppress(PeerError):  # the next step meets it and says so
        await hop.keep()


async def release(hops: Sequence[HopSession]) -> None:
    """Free reservations, all at the same time."""
    await asyncio.gather(*(hop.close() for hop in hops))


async def open_path(swarm: SwarmView, blocks: BlockSpan, terms: Terms) -> SessionPath:
    """Reserve a whole route.

    Raises MissingBlocksError, CacheFull after ``alloc_timeout``, the refusal of the last server
    that could have served (RequestTooLarge, UnknownAdapter, ...), a PeerError after
    ``max_retries``.
    """
    path = SessionPath(await _Opening(swarm, blocks, terms).run(), swarm)
    for hop in path.hops:
        swarm.note_success(hop.peer_id, hop.info)
    swarm.paths.add(path)
    return path


class _Opening:
    """One attempt after another, with what they have taught."""

    def __init__(self, swarm: SwarmView, blocks: BlockSpan, terms: Terms) -> None:
        config = swarm.config
        self._swarm = swarm
        self._terms = terms
        self._needs = Needs(
            blocks=blocks,
            model=swarm.model,
            cache_tokens=(terms.max_length or 0) * terms.num_rows,
        )
        self._patience = Patience(
            connect_seconds=config.connect_timeout, request_seconds=config.request_timeout
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
        try:
            return await self._swarm.route(replace(self._needs, exclude=frozenset(exclude)))
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
        patience = replace(self._patience, alloc_seconds=seconds)
        try:
            held = await HopSession.open(self._swarm.node, full, self._terms, patience)
        except PetalsError as error:
            await self._learn(full, error)
            return []
        del self._full[full.peer_id]
        return [held]

    async def _reserve(self, route: Route, held: list[HopSession]) -> list[HopSession] | None:
        """Ask all hops not ``held``, without waiting; None, and nothing held, if one refuses."""
        have = {session.hop: session for session in held}
        missing = [hop for hop in route if hop not in have]
        tasks = [asyncio.create_task(self._open(hop)) for hop in missing]
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

    async def _open(self, hop: Hop) -> HopSession:
        return await HopSession.open(self._swarm.node, hop, self._terms, self._patience)

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
                self._num_failures += 1
                self._swarm.note_failure(hop.peer_id, error)
                if self._num_failures > self._swarm.config.num_retries:
                    raise error
                await asyncio.sleep(self._swarm.config.backoff_seconds(self._num_failures))
            case _:
                raise error


def _opened(tasks: Sequence["asyncio.Task[HopSession]"]) -> list[HopSession]:
    return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
