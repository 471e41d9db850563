"""What one client knows of the servers of its model: records, measurements, bans.

Records are read anew each ``update_period`` and on demand; what changes fast (link, queue, room) is
measured where there is a choice, and learned from every session opened. Feeds the pure ``routing``;
decides nothing itself. Lives in one event loop.
"""

import asyncio
import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from petals.client.config import ClientConfig
from petals.client.connection.adapter_delivery import AdapterDelivery
from petals.client.connection.channel_pool import ChannelPool
from petals.client.routing.bans import Bans, Cause
from petals.client.routing.route import (
    Candidate,
    Needs,
    find_route,
    find_throughput_route,
    missing_blocks,
)
from petals.errors import (
    MissingBlocksError,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    RouteError,
    UnknownAdapter,
)
from petals.logs import get_logger
from petals.models.runtime.token_log import LogBudget
from petals.swarm.directory.records import ServerRecord, View
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, Hop, PeerId, Route, ServerState
from petals.wire.replies import Info
from petals.wire.requests import GetInfo

logger = get_logger(__name__)

UNKNOWN_BLOCKS_PER_SECOND = 300.0


class Closing(Protocol):
    """Something open in the swarm that must not outlive the view."""

    async def close(self) -> None: ...


class SwarmState:
    """The servers of one model as this client sees them."""

    def __init__(self, node: SwarmNode, config: ClientConfig, model: str, num_blocks: int) -> None:
        self.node = node
        self.config = config
        self.model = model
        self.num_blocks = num_blocks
        self.bans = Bans(config.ban_timeout, config.failover.max_ban_seconds)
        self.closed_links: dict[tuple[PeerId, PeerId], float] = {}
        """(near, far) -> until when (s, monotonic) states from ``near`` to ``far`` go through the
        client, since the direct link between them has failed.
        """
        self.channels = ChannelPool(node, config.silence_timeout)
        self.log_budget = LogBudget(config.max_kept_bytes)
        self.adapters = AdapterDelivery(
            model, self.channels, self.connect_seconds, config.request_timeout
        )
        self.sessions: set[Closing] = set()
        """Open sessions; closed with the view."""
        self._clock = node.clock
        self._records: View | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._round_trips: dict[PeerId, float] = {}
        self._infos: dict[PeerId, tuple[Info, float]] = {}
        self._leaving_until: dict[PeerId, float] = {}
        self._table: tuple[Candidate, ...] | None = None

    def under(self, config: ClientConfig) -> "SwarmState":
        """The same servers under another config; measurements, bans, channels and sessions are
        shared. Records are read by each view for itself.
        """
        other = copy.copy(self)
        other.config, other._table, other._refreshing = config, None, None
        return other

    async def close(self) -> None:
        """Close open sessions and idle channels. The node is its owner's."""
        await asyncio.gather(*(session.close() for session in list(self.sessions)))
        await self.channels.close()

    async def records(self) -> View:
        """The directory's view, at most ``update_period`` old."""
        if self._records is None or self._age() > self.config.update_period:
            await self.refresh()
        assert self._records is not None
        return self._records

    async def refresh(self, older_than: float = 0.0) -> None:
        """Read the records anew unless they are younger than ``older_than`` seconds."""
        async with self._reading:
            if self._records is not None and self._age() <= older_than:
                return
            is_first = self._records is None
            self._records = await self.node.directory.view(self.model, self.num_blocks)
            self._read_at = self._clock.monotonic()
            self._table = None
        chosen = self._worth_measuring()
        if chosen and is_first:
            await self.measure(chosen)
        elif chosen:
            self.node.background.start(self.measure(chosen), "measuring servers")

    async def route(
        self,
        needs: Needs,
        *,
        throughput: bool = False,
        is_repair: bool = False,
        in_haste: bool = False,
    ) -> Route:
        """A route for ``needs`` now; ``throughput`` draws one of many instead of the fastest.

        Banned servers are used where nobody else holds a block; for a repair only if they were no
        worse than slow. For a repair, or ``in_haste``, old records do, while they are read anew (a
        server that has just gone holds reading up for seconds). Raises MissingBlocksError,
        NoCapacity, TrainingRefused, UnknownAdapter.
        """
        if self._records is None or not (is_repair or in_haste):
            await self.records()
        elif self._age() > self.config.update_period:
            self._refresh_aside()
        try:
            route = self._find(needs, throughput, is_repair)
        except MissingBlocksError:
            if is_repair:
                self._refresh_aside()
                raise
            await self.refresh(older_than=self.config.failover.fresh_seconds)
            try:
                route = self._find(needs, throughput, is_repair)
            except MissingBlocksError:
                self._blame_the_adapter(needs.blocks)
                raise
        if self.config.show_route is True:
            logger.info("route: %s", show(route))
        return route

    async def measure(self, peers: Iterable[PeerId]) -> None:
        """Ask these servers how they are, all at the same time; those that fail are banned."""
        await asyncio.gather(*(self._measure(peer) for peer in peers))

    async def look_again(self, blocks: BlockSpan) -> None:
        """Read the records anew, and ask those who hold some of ``blocks`` and only did not answer
        a call how they are: who answers is avoided no more.

        Returns when that is done or after ``look_again_seconds``; what comes later counts, too.
        """
        now = self._clock.monotonic()
        doubted = self.bans.at(now, Cause.UNANSWERED) - self.bans.at(now, Cause.FAILED)
        holders = {c.peer_id for c in self.candidates() if c.blocks.overlaps(blocks)}
        calls = self.measure(doubted & holders)
        called = self.node.background.start(calls, "calling avoided servers")
        seconds = self.config.failover.look_again_seconds
        await asyncio.wait({called, self._refresh_aside()}, timeout=seconds)

    def _refresh_aside(self) -> "asyncio.Task[None]":
        """``refresh`` beside whatever else happens; one at a time."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self.node.background.start(
                self._refresh_quietly(), "reading records"
            )
        return self._refreshing

    async def _refresh_quietly(self) -> None:
        with contextlib.suppress(PetalsError):
            await self.refresh()

    async def warm_spares(self, route: Route, cache_tokens: int = 0) -> None:
        """Ask those who could replace each hop how they are; a channel to each stays open.

        Where one has no room for ``cache_tokens`` in each block, the next best is asked, too.
        """
        asked = {hop.peer_id for hop in route}
        rounds = self.config.failover.spare_rounds
        for _ in range(rounds if self.config.max_pinged else 0):
            spares: set[PeerId] = set()
            for hop in route:
                needs = Needs(
                    blocks=hop.blocks, cache_tokens=cache_tokens, exclude=frozenset({hop.peer_id})
                )
                with contextlib.suppress(RouteError):
                    spares.update(spare.peer_id for spare in self._find(needs, False, True))
            spares -= asked
            if not spares:
                return
            asked |= spares
            await asyncio.gather(*(self._measure(peer, stay=True) for peer in spares))

    def connect_seconds(self, peer: PeerId) -> float:
        """How long a channel to a server may take to open. One that has answered before and now
        gives no sign of life is gone, as on an open channel.
        """
        config = self.config
        is_known = peer in self._round_trips or peer in self._infos
        return min(config.connect_timeout, config.silence_timeout if is_known else math.inf)

    def note_failure(self, peer: PeerId, error: PetalsError, cause: Cause = Cause.FAILED) -> None:
        """Avoid a server for a while, if ``error`` is its own fault (never for a client's)."""
        if isinstance(error, PeerError):
            is_seen = isinstance(error, PeerMisbehaved) and not error.reported
            factor = self.config.failover.misbehaved_factor if is_seen else 1.0
            if not isinstance(error, PeerUnreachable | PeerTimeout):
                cause = Cause.FAILED
            ban = self.bans.add(peer, self._clock.monotonic(), factor, cause)
            logger.info("avoiding …%s for %.0f s: %s", peer[-6:], ban.seconds, error.message)

    def note_success(self, peer: PeerId, info: Info | None = None) -> None:
        """A server has answered; ``info`` is what it said of itself."""
        self.bans.lift(peer)
        if info is not None:
            self._infos[peer] = (info, self._clock.monotonic())
            self._table = None

    def note_leaving(self, peer: PeerId, seconds: float) -> None:
        """A server has said that it goes in ``seconds``: no new route leads through it until then,
        whatever records of before say.
        """
        self._leaving_until[peer] = self._clock.monotonic() + seconds
        self._table = None

    def candidates(self) -> tuple[Candidate, ...]:
        """The table that routes are made from: ONLINE servers we may use, and how they are."""
        if self._table is None:
            self._table = tuple(
                self._candidate(record, span)
                for record in self._usable_records()
                for span in record.block_spans
            )
        return self._table

    def promised_seconds(self, hop: Hop) -> float | None:
        """What one token costs at ``hop`` by its record and its queue; None if it is unknown."""
        return self._quickest(hop.blocks, lambda peer: peer == hop.peer_id)

    def alternative_seconds(self, hop: Hop, cache_tokens: int = 0) -> float | None:
        """The same for the best other server that we have measured and do not avoid, and that has
        room for ``cache_tokens`` in each block.
        """
        avoided = self.bans.at(self._clock.monotonic()) | {hop.peer_id}
        measured = self._round_trips.keys() - avoided
        return self._quickest(hop.blocks, measured.__contains__, cache_tokens)

    def _quickest(
        self, blocks: BlockSpan, admits: Callable[[PeerId], bool], cache_tokens: int = 0
    ) -> float | None:
        wanted = cache_tokens * len(blocks)
        return min(
            (
                candidate.queue_seconds + candidate.seconds_per_block * len(blocks)
                for candidate in self.candidates()
                if admits(candidate.peer_id)
                and candidate.blocks.covers(blocks)
                and (candidate.tokens_free is None or candidate.tokens_free >= wanted)
            ),
            default=None,
        )

    def _find(self, needs: Needs, throughput: bool, is_repair: bool) -> Route:
        candidates, now = self.candidates(), self._clock.monotonic()
        if is_repair:
            silent = self.bans.at(now, Cause.UNANSWERED)
            candidates = tuple(c for c in candidates if c.peer_id not in silent)
        needs = replace(needs, avoid=self.bans.at(now))
        if throughput:
            route = find_throughput_route(candidates, needs, random.random)
        else:
            route = find_route(candidates, needs)
        return route

    def _usable_records(self, *, any_adapter: bool = False) -> list[ServerRecord]:
        config = self.config
        allowed, blocked = config.allowed_servers, config.blocked_servers or frozenset()
        adapter = None if any_adapter else config.active_adapter
        now = self._clock.monotonic()
        return [
            record
            for record in (self._records.records.values() if self._records is not None else ())
            if record.state is ServerState.ONLINE
            and (allowed is None or record.peer_id in allowed)
            and record.peer_id not in blocked
            and now >= self._leaving_until.get(PeerId(record.peer_id), 0.0)
            and (adapter is None or adapter in record.adapters)
        ]

    def _candidate(self, record: ServerRecord, span: BlockSpan) -> Candidate:
        peer = PeerId(record.peer_id)
        rate = record.inference_rps or record.throughput or UNKNOWN_BLOCKS_PER_SECOND
        info, said_at = self._infos.get(peer, (None, 0.0))
        if info is not None and self._clock.monotonic() - said_at > self.config.update_period:
            info = None
        return Candidate(
            peer_id=peer,
            blocks=span,
            seconds_per_block=1.0 / rate,
            queue_seconds=0.0 if info is None else _queue_seconds(info),
            round_trip_seconds=self._round_trips.get(peer),
            tokens_free=None if info is None else info.tokens_free,
            outbox_tokens_free=None if info is None else _outbox_tokens(info),
            trains=record.trains,
        )

    def _worth_measuring(self) -> list[PeerId]:
        """Some holders of every block that has several, the unmeasured first."""
        if self._records is None or not self.config.max_pinged:
            return []
        banned = self.bans.at(self._clock.monotonic())
        usable = {record.peer_id for record in self._usable_records()} - banned
        chosen: dict[PeerId, None] = {}
        for block in range(self._records.num_blocks):
            peers = [PeerId(r.peer_id) for r in self._records.holders(block)]
            peers = [peer for peer in peers if peer in usable]
            if len(peers) > 1:
                random.shuffle(peers)
                peers.sort(key=self._round_trips.__contains__)
                chosen |= dict.fromkeys(peers[: self.config.max_pinged])
        return list(chosen)[: self.config.failover.max_measured]

    async def _measure(self, peer: PeerId, *, stay: bool = False) -> None:
        seconds = self.config.ping_timeout
        try:
            channel = await self.channels.take(peer, "blocks", seconds)
            try:
                self._round_trips[peer] = await channel.ping(seconds)
                info, _ = await channel.request(GetInfo(), expect=Info, timeout=seconds)
            except BaseException:
                await channel.close()
                raise
        except PetalsError as error:
            self.note_failure(peer, error, Cause.UNANSWERED)
            return
        self.note_success(peer, info)
        await (self.channels.give(channel) if stay else channel.close())

    def _blame_the_adapter(self, blocks: BlockSpan) -> None:
        """Raise UnknownAdapter if only the adapter is what nobody has."""
        adapter = self.config.active_adapter
        held = [span for r in self._usable_records(any_adapter=True) for span in r.block_spans]
        if adapter is not None and not missing_blocks(held, blocks):
            raise UnknownAdapter(
                f"The servers of blocks {blocks} do not have the adapter {adapter!r}.",
                hint=f"Start them with petals serve --adapters {adapter}, "
                "or leave active_adapter out.",
            )

    def _age(self) -> float:
        return self._clock.monotonic() - self._read_at


def show(route: Route) -> str:
    """A route in one line, for logs."""
    return ", ".join(f"{hop.blocks} at …{hop.peer_id[-6:]}" for hop in route)


def _outbox_tokens(info: Info) -> int:
    """How many tokens' outputs it can keep, in the precision it computes in."""
    itemsize = 4 if info.dtype == "float32" else 2
    return info.outbox_bytes_free // max(1, info.hidden_size * itemsize)


def _queue_seconds(info: Info) -> float:
    """How long a step waits there: half of the running batch, and the batches before it."""
    batches = info.queue_tokens / max(1, info.max_batch_tokens)
    return info.step_seconds * (batches + (0.5 if info.num_sessions else 0.0))
