"""A swarm of 10 to 10,000 servers that come, go and die, in simulated time and one thread.

    python benchmarks/simulate.py --servers 10000 --hours 48 --out benchmarks/results/<file>.md

Placement, rebalancing, routing and the directory's sharding are the product's own functions; only
time, chance, the servers and the record store are made up here. See METHODOLOGY.md.
"""

import argparse
import heapq
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np

from petals.client.routing import HOP_OVERHEAD_SECONDS, Candidate, Needs, find_route
from petals.errors import MissingBlocksError
from petals.server import placement, rebalancing
from petals.server.placement import Picture
from petals.server.rebalancing import MovePolicy, Standing
from petals.swarm import records
from petals.swarm.identity import Identity
from petals.swarm.records import ServerRecord, View
from petals.types import BlockSpan, ModelId, PeerId, Route, ServerState

HOUR = 3600.0
MODEL = "example/a-model-of-some-size"
REGION_SHARES = (0.27, 0.14, 0.05, 0.26, 0.08, 0.15, 0.05)
REGION_MS = (  # NA east and west, SA, EU west and east, Asia east, Oceania: typical backbones
    (12, 62, 115, 78, 105, 165, 200),
    (62, 12, 170, 135, 160, 110, 140),
    (115, 170, 15, 185, 210, 270, 300),
    (78, 135, 185, 12, 35, 220, 260),
    (105, 160, 210, 35, 15, 190, 280),
    (165, 110, 270, 220, 190, 30, 120),
    (200, 140, 300, 260, 280, 120, 15),
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens to the swarm. Rates are per server and hour, times in seconds.

    A server that goes tells nobody in ``sudden_share`` of the cases; its record then stays until
    it expires. ``shock_at``: the hour at which ``shock_share`` of those that hold a block of the
    second quarter of the model die at once.
    """

    num_servers: int
    hours: float
    num_blocks: int = 80
    churn_per_hour: float = 0.1
    sudden_share: float = 0.5
    load_seconds: float = 240.0
    expiry_seconds: float = 60.0
    lag_seconds: float = 30.0
    settle_seconds: float = 45.0
    warm_up_hours: float = 2.0
    shock_at: float | None = None
    shock_share: float = 0.6
    seed: int = 0
    policy: MovePolicy | None = field(default_factory=MovePolicy)
    num_route_samples: int = 20
    holders_worth: float = 4.0
    """Small swarms get servers large enough that every block has so many holders on average."""


@dataclass(slots=True)
class Server:
    """One server as it really is. ``throughput`` in block passes per second."""

    peer_id: PeerId
    capacity: int
    throughput: float
    region: int
    last_mile: float
    blocks: BlockSpan = BlockSpan(0, 0)
    is_serving: bool = False
    is_alive: bool = True
    standing: Standing | None = None


@dataclass
class Tally:
    """What was seen after the warm-up. Seconds of simulated time unless said otherwise."""

    seconds: float = 0.0
    enough_seconds: float = 0.0
    covered_seconds: float = 0.0
    covered_enough_seconds: float = 0.0
    bottleneck: float = 0.0
    optimum: float = 0.0
    server_hours: float = 0.0
    joins: int = 0
    ends: int = 0
    moves: int = 0
    refused_moves: int = 0
    uncovered_by_moves: int = 0
    gaps: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    replaced: list[float] = field(default_factory=list)
    place_seconds: list[float] = field(default_factory=list)
    look_seconds: list[float] = field(default_factory=list)
    timeline: list[tuple[float, float]] = field(default_factory=list)
    routes: dict[str, "Routes"] = field(default_factory=dict)
    directory: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Routes:
    """Costs of routes over the cheapest there was, and how long finding them took."""

    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_missing: int = 0
    num_dead_hops: int = 0
    num_hops: int = 0


class Directory:
    """Records as readers find them: late by up to the lag, and the dead until they expire."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.records: dict[PeerId, ServerRecord] = {}
        self._view: View | None = None
        self._picture: Picture | None = None

    def put(self, server: Server, state: ServerState, throughput: float) -> None:
        blocks = server.blocks
        self.records[server.peer_id] = ServerRecord(
            peer_id=server.peer_id,
            model=MODEL,
            num_blocks=self.scenario.num_blocks,
            spans=((blocks.start, blocks.end),),
            state=state,
            expires_at=math.inf,
            throughput=throughput,
            inference_rps=throughput,
        )

    def view(self, now: float, lag: float | None = None) -> View:
        lag = self.scenario.lag_seconds if lag is None else lag
        if self._view is None or now - self._view.taken_at > lag:
            known = MappingProxyType(dict(self.records))
            self._view = View(ModelId(MODEL), self.scenario.num_blocks, known, now)
            self._picture = None
        return self._view

    def picture(self, now: float, lag: float | None = None) -> tuple[View, Picture]:
        """All readers of one moment see the same, so it is worked out once."""
        view = self.view(now, lag)
        if self._picture is None:
            self._picture = placement.picture_of(view)
        return view, self._picture


class Simulation:
    """Runs one scenario; ``tally`` fills while it runs."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.now = 0.0
        self.tally = Tally()
        self.directory = Directory(scenario)
        self.servers: dict[PeerId, Server] = {}
        self.holders = np.zeros(scenario.num_blocks, dtype=np.int64)
        self.served = np.zeros(scenario.num_blocks)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._gap_since: float | None = None
        self._capacity_blocks = 0
        self._capacity_passes = 0.0

    def run(self) -> Tally:
        scenario = self.scenario
        self._fill()
        self._arrive_later()
        end = (scenario.warm_up_hours + scenario.hours) * HOUR
        start = scenario.warm_up_hours * HOUR
        every = (end - start) / max(1, scenario.num_route_samples)
        for number in range(scenario.num_route_samples):
            self._at(start + every * (number + 0.5), self._sample)
        for number in range(int(scenario.hours * 4)):
            self._at(start + number * HOUR / 4, self._note_balance)
        if scenario.shock_at is not None:
            self._at(start + scenario.shock_at * HOUR, self._shock)
        while self._events and self._events[0][0] <= end:
            when, _, act = heapq.heappop(self._events)
            self._pass_time(when)
            act()
        self._pass_time(end)
        return self.tally

    @property
    def is_measuring(self) -> bool:
        return self.now >= self.scenario.warm_up_hours * HOUR

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), act))

    def _pass_time(self, until: float) -> None:
        seconds, self.now = until - self.now, until
        if not self.is_measuring or seconds <= 0:
            return
        tally, num_blocks = self.tally, self.scenario.num_blocks
        is_covered = bool(self.holders.all())
        is_enough = self._capacity_blocks >= 3 * num_blocks
        tally.seconds += seconds
        tally.enough_seconds += seconds * is_enough
        tally.covered_seconds += seconds * is_covered
        tally.covered_enough_seconds += seconds * (is_covered and is_enough)
        tally.bottleneck += seconds * float(self.served.min())
        tally.optimum += seconds * self._capacity_passes / num_blocks
        tally.server_hours += seconds * len(self.servers) / HOUR

    # -- servers come and go -------------------------------------------------------------------

    def _new_server(self) -> Server:
        scenario, rng = self.scenario, self.rng
        typical = max(10.0, scenario.holders_worth * scenario.num_blocks / scenario.num_servers)
        capacity = round(typical * rng.lognormvariate(-0.125, 0.5))
        number = next(self._numbers)
        server = Server(
            peer_id=PeerId(f"12D3KooW{rng.getrandbits(160):040x}{number:04d}"),
            capacity=min(scenario.num_blocks, max(2, capacity)),
            throughput=1000.0 * rng.lognormvariate(0.0, 0.7),
            region=rng.choices(range(len(REGION_SHARES)), REGION_SHARES)[0],
            last_mile=0.008 * rng.lognormvariate(0.0, 0.8),
        )
        self.servers[server.peer_id] = server
        self._capacity_blocks += server.capacity
        self._capacity_passes += server.throughput
        lifetime = rng.expovariate(scenario.churn_per_hour) * HOUR
        self._at(self.now + lifetime, lambda: self._end(server, rng.random()))
        return server

    def _fill(self) -> None:
        """The swarm as it is found: servers came one by one and saw each other."""
        worth = np.zeros(self.scenario.num_blocks)
        for _ in range(self.scenario.num_servers):
            server = self._new_server()
            server.blocks = placement.choose_span(worth, server.capacity)
            worth[server.blocks.start : server.blocks.end] += server.throughput / server.capacity
            self._go_online(server)

    def _arrive_later(self) -> None:
        rate = self.scenario.churn_per_hour * self.scenario.num_servers
        self._at(self.now + self.rng.expovariate(rate) * HOUR, self._arrive)

    def _arrive(self) -> None:
        self._arrive_later()
        server = self._new_server()
        began = time.perf_counter()
        _, picture = self.directory.picture(self.now)
        server.blocks = placement.choose_span(picture.worth, server.capacity)
        self.directory.put(server, ServerState.JOINING, 0.0)
        if self.is_measuring:
            self.tally.joins += 1
            self.tally.place_seconds.append(time.perf_counter() - began)
        # Reading everything afresh for each of many thousands would only cost the simulation time.
        lag = 2.0 if self.scenario.num_servers <= 1000 else None
        view = self.directory.view(self.now, lag)
        if placement.must_yield(view, server.blocks, server.peer_id):
            picture = self.directory.picture(self.now)[1]
            if server.peer_id in view.records:
                picture = picture.without(view.records[server.peer_id])
            server.blocks = placement.choose_span(picture.worth, server.capacity)
            self.directory.put(server, ServerState.JOINING, 0.0)
        self._load(server)

    def _load(self, server: Server) -> None:
        seconds = self.scenario.load_seconds * self.rng.lognormvariate(0.0, 0.5)
        self._at(self.now + seconds, lambda: self._go_online(server))

    def _go_online(self, server: Server) -> None:
        if not server.is_alive:
            return
        self._serve(server, True)
        self.directory.put(server, ServerState.ONLINE, server.throughput)
        if self.scenario.policy is not None:
            server.standing = rebalancing.begin(
                server.peer_id, self.now, len(self.servers), self.scenario.policy
            )
            self._at(server.standing.next_look, lambda: self._look(server))

    def _serve(self, server: Server, is_serving: bool) -> None:
        sign = 1 if is_serving else -1
        window = slice(server.blocks.start, server.blocks.end)
        self.holders[window] += sign
        self.served[window] += sign * server.throughput / len(server.blocks)
        server.is_serving = is_serving
        if self.holders.all():
            if self._gap_since is not None and self.is_measuring:
                self.tally.gaps.append(self.now - self._gap_since)
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = self.now

    def _end(self, server: Server, drawn: float) -> None:
        if not server.is_alive:
            return
        server.is_alive = False
        del self.servers[server.peer_id]
        self._capacity_blocks -= server.capacity
        self._capacity_passes -= server.throughput
        self.tally.ends += self.is_measuring
        if server.is_serving:
            self._serve(server, False)
        is_sudden = drawn < self.scenario.sudden_share
        stays = self.scenario.expiry_seconds * (1 - drawn / 3) if is_sudden else 0.0
        self._at(self.now + stays, lambda: self._forget(server.peer_id))

    def _forget(self, peer_id: PeerId) -> None:
        self.directory.records.pop(peer_id, None)

    def _shock(self) -> None:
        quarter = self.scenario.num_blocks // 4
        struck = BlockSpan(quarter, 2 * quarter)
        for server in list(self.servers.values()):
            if server.blocks.overlaps(struck) and self.rng.random() < self.scenario.shock_share:
                self._end(server, 0.0)

    # -- servers move --------------------------------------------------------------------------

    def _look(self, server: Server) -> None:
        standing, policy = server.standing, self.scenario.policy
        if not server.is_alive or not server.is_serving or standing is None or policy is None:
            return
        view, picture = self.directory.picture(self.now)
        record = view.records.get(server.peer_id)
        if record is None or record.spans != ((server.blocks.start, server.blocks.end),):
            self._at(self.now + self.scenario.lag_seconds, lambda: self._look(server))
            return
        began = time.perf_counter()
        standing, blocks = rebalancing.look(picture, record, self.now, standing, policy)
        if self.is_measuring:
            self.tally.look_seconds.append(time.perf_counter() - began)
        server.standing = standing
        if blocks is None:
            self._at(standing.next_look, lambda: self._look(server))
            return
        self.directory.put(server, ServerState.DRAINING, server.throughput)
        self._at(self.now + self.scenario.settle_seconds, lambda: self._leave_for(server, blocks))

    def _leave_for(self, server: Server, blocks: BlockSpan) -> None:
        if not server.is_alive:
            return
        if not rebalancing.may_leave(self._answering(), server.peer_id):
            self.tally.refused_moves += self.is_measuring
            self.directory.put(server, ServerState.ONLINE, server.throughput)
            assert server.standing is not None
            self._at(max(self.now, server.standing.next_look), lambda: self._look(server))
            return
        was_covered = self.holders > 0
        self._serve(server, False)
        if self.is_measuring:
            self.tally.moves += 1
            self.tally.uncovered_by_moves += bool((was_covered & (self.holders == 0)).any())
        server.blocks = blocks
        self.directory.put(server, ServerState.JOINING, server.throughput)
        self._load(server)

    def _answering(self) -> View:
        """The view without those that do not answer a ping."""
        view = self.directory.view(self.now)
        known = {p: r for p, r in view.records.items() if p in self.servers}
        return View(view.model, view.num_blocks, MappingProxyType(known), view.taken_at)

    # -- what is looked at ---------------------------------------------------------------------

    def _note_balance(self) -> None:
        bound = self._capacity_passes / self.scenario.num_blocks
        ratio = float(self.served.min()) / bound
        self.tally.ratios.append(ratio)
        self.tally.timeline.append((self.now / HOUR - self.scenario.warm_up_hours, ratio))
        if len(self.tally.ratios) % 16 == 1:
            self.tally.replaced.append(_placed_anew(self) / bound)

    def _sample(self) -> None:
        from_client = _Client(self)
        from_client.measure(self.tally)


def _placed_anew(simulation: Simulation) -> float:
    """Bottleneck if all servers were placed at once, the largest first: one can have that."""
    served = np.zeros(simulation.scenario.num_blocks)
    servers = sorted(simulation.servers.values(), key=lambda s: -s.throughput / s.capacity)
    for server in servers:
        blocks = placement.choose_span(served, server.capacity)
        served[blocks.start : blocks.end] += server.throughput / server.capacity
    return float(served.min())


# -- a client ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a client reads the directory: shards per bucket and minute, records per shard."""

    name: str
    per_shard: int
    num_shards: int
    minutes_kept: int
    reads_sample: bool


READINGS = (
    Reading("200 a shard, sample + 4 shards each minute", 200, 4, 1, True),
    Reading("24 a shard, sample + 4 shards each minute", 24, 4, 1, True),
    Reading("24 a shard, 1 shard each minute", 24, 1, 1, False),
    Reading("24 a shard, 1 shard each minute, kept 5", 24, 1, 5, False),
)
_SAMPLE_EVERY_MINUTES = 10
_MAX_MEASURED = 32


class _Client:
    """Somebody, somewhere, who reads the directory and wants a route through the whole model."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.rng = simulation, simulation.rng
        self.region = self.rng.choices(range(len(REGION_SHARES)), REGION_SHARES)[0]
        self.last_mile = 0.008 * self.rng.lognormvariate(0.0, 0.8)
        self.num_blocks = simulation.scenario.num_blocks
        self.seed = self.rng.getrandbits(32)
        self.known = dict(simulation.directory.view(simulation.now).records)

    def measure(self, tally: Tally) -> None:
        alive = [s for s in self.simulation.servers.values() if s.is_serving]
        best = self._cheapest(alive)
        if best == math.inf:
            return
        online = [r for r in self.known.values() if r.state is ServerState.ONLINE]
        everyone = frozenset(PeerId(r.peer_id) for r in online)
        self._try("everything known and measured", online, everyone, best, tally)
        for reading in READINGS:
            read, num_bytes = self._read(online, reading)
            tally.directory.setdefault(reading.name, []).append(num_bytes)
            ways = {
                "first": self._first(read),
                "spread": self._spread(read),
                "guided": self._guided(read),
            }
            for name, chosen in ways.items():
                self._try(f"{reading.name}; {name} {_MAX_MEASURED}", read, chosen, best, tally)

    def _try(
        self,
        name: str,
        read: list[ServerRecord],
        measured: frozenset[PeerId],
        best: float,
        tally: Tally,
    ) -> None:
        routes = tally.routes.setdefault(name, Routes())
        table = [self._candidate(record, measured) for record in read]
        began = time.perf_counter()
        try:
            route = find_route(table, Needs(blocks=BlockSpan(0, self.num_blocks)))
        except MissingBlocksError:
            routes.num_missing += 1
            return
        routes.seconds.append(time.perf_counter() - began)
        routes.num_hops += len(route)
        dead = [hop for hop in route if not self._serves(hop.peer_id)]
        routes.num_dead_hops += len(dead)
        if not dead:
            routes.ratios.append(self._cost(route) / best)

    def _serves(self, peer_id: PeerId) -> bool:
        server = self.simulation.servers.get(peer_id)
        return server is not None and server.is_serving

    def _candidate(self, record: ServerRecord, measured: frozenset[PeerId]) -> Candidate:
        peer_id = PeerId(record.peer_id)
        server = self.simulation.servers.get(peer_id)
        is_known = peer_id in measured and server is not None
        return Candidate(
            peer_id=peer_id,
            blocks=record.block_spans[0],
            seconds_per_block=1.0 / record.throughput,
            round_trip_seconds=self._round_trip(server) if is_known else None,
        )

    def _round_trip(self, server: Server) -> float:
        return REGION_MS[self.region][server.region] / 1000 + self.last_mile + server.last_mile

    def _cost(self, route: Route) -> float:
        total = 0.0
        for hop in route:
            server = self.simulation.servers[hop.peer_id]
            total += HOP_OVERHEAD_SECONDS + self._round_trip(server)
            total += len(hop.blocks) / server.throughput
        return total

    def _cheapest(self, alive: list[Server]) -> float:
        """Exact, over all servers at once: the cost of the best route there is."""
        starts = np.array([s.blocks.start for s in alive])
        ends = np.array([s.blocks.end for s in alive])
        trips = np.array([self._round_trip(s) for s in alive]) + HOP_OVERHEAD_SECONDS
        blocks = np.array([1.0 / s.throughput for s in alive])
        inside, reached = np.full(len(alive), np.inf), 0.0
        for block in range(self.num_blocks):
            inside = np.minimum(inside, reached + trips) + blocks
            inside[(block < starts) | (block >= ends)] = np.inf
            reached = float(inside.min(initial=np.inf))
        return reached

    # -- the directory -------------------------------------------------------------------------

    def _read(
        self, online: list[ServerRecord], reading: Reading
    ) -> tuple[list[ServerRecord], float]:
        """What the client knows after reading that way for a while, and the bytes of a minute."""
        by_bucket: dict[int, list[ServerRecord]] = {}
        for record in online:
            for bucket in records.buckets_of(record.block_spans):
                by_bucket.setdefault(bucket, []).append(record)
        population = max(len(found) for found in by_bucket.values())
        bits = records.shard_bits_for(population, reading.per_shard)
        store: dict[str, list[ServerRecord]] = {}
        for record in online:
            placed = msgspec.structs.replace(record, shard_bits=bits)
            for key in records.keys_to_store(placed):
                store.setdefault(key, []).append(placed)
        found: dict[str, ServerRecord] = {}
        num_bytes = 0.0
        for bucket in by_bucket:
            sample_key = records.block_key(MODEL, bucket, 0, 0)
            sample = store.get(sample_key, [])
            per_minute = 1.0 if reading.reads_sample or not bits else 1 / _SAMPLE_EVERY_MINUTES
            num_bytes += per_minute * len(sample) * RECORD_BYTES
            keys = {sample_key} if per_minute == 1.0 else set()
            for minute in range(reading.minutes_kept):
                seed = self.seed + minute * reading.num_shards
                keys |= set(records.shards_to_read(MODEL, bucket, sample, reading.num_shards, seed))
            new = [store.get(key, []) for key in keys]
            found |= {record.peer_id: record for part in new for record in part}
            further = sum(len(store.get(key, [])) for key in keys - {sample_key})
            num_bytes += further * RECORD_BYTES / reading.minutes_kept
        return list(found.values()), num_bytes

    def _first(self, read: list[ServerRecord]) -> frozenset[PeerId]:
        """Three of every block, the blocks in order, until the limit."""
        chosen: dict[PeerId, None] = {}
        for block in range(self.num_blocks):
            chosen |= dict.fromkeys(self._some_holders(read, block))
        return frozenset(list(chosen)[:_MAX_MEASURED])

    def _spread(self, read: list[ServerRecord]) -> frozenset[PeerId]:
        """The same number, evenly over the blocks."""
        chosen: dict[PeerId, None] = {}
        blocks = list(range(self.num_blocks))
        self.rng.shuffle(blocks)
        for block in blocks:
            chosen |= dict.fromkeys(self._some_holders(read, block)[:1])
        return frozenset(list(chosen)[:_MAX_MEASURED])

    def _guided(self, read: list[ServerRecord]) -> frozenset[PeerId]:
        """A few at random, then always the hops of the best route so far that are not measured."""
        measured = set(sorted(self._spread(read), key=str)[: _MAX_MEASURED // 4])
        while len(measured) < _MAX_MEASURED:
            table = [self._candidate(record, frozenset(measured)) for record in read]
            try:
                route = find_route(table, Needs(blocks=BlockSpan(0, self.num_blocks)))
            except MissingBlocksError:
                break
            new = [hop.peer_id for hop in route if hop.peer_id not in measured]
            new = [peer_id for peer_id in new if peer_id in self.simulation.servers]
            if not new:
                break
            measured |= set(new[: _MAX_MEASURED - len(measured)])
        return frozenset(measured)

    def _some_holders(self, read: list[ServerRecord], block: int) -> list[PeerId]:
        holders = [PeerId(record.peer_id) for record in read if record.holds(block)]
        return self.rng.sample(holders, min(3, len(holders)))


def _record_bytes() -> int:
    """Size of a sealed record with two addresses, its subkey and expiry included."""
    identity = Identity.generate()
    peer_id = identity.peer_id
    record = ServerRecord(
        peer_id=peer_id,
        model=MODEL,
        num_blocks=80,
        spans=((10, 20),),
        state=ServerState.ONLINE,
        expires_at=1.7e9 + 0.123,
        throughput=812.123,
        inference_rps=300.2,
        forward_rps=812.123,
        max_length=8192,
        cache_tokens=65536,
        version="3.0.0",
        protocol_version=1,
        addresses=tuple(f"/ip4/203.0.113.{n}/tcp/31337/p2p/{peer_id}" for n in range(2)),
    )
    return len(records.seal(record, identity)) + len(peer_id) + 16


RECORD_BYTES = _record_bytes()


# -- the report ----------------------------------------------------------------------------------


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f} %" if whole else "-"


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def describe(scenario: Scenario, tally: Tally, wall_seconds: float) -> str:
    """One scenario in Markdown."""
    hours, num_looks = tally.seconds / HOUR, len(tally.look_seconds)
    moves = "off" if scenario.policy is None else "on"
    rows = [
        ("every block served, share of time", _percent(tally.covered_seconds, tally.seconds)),
        (
            "the same while capacity >= 3 holders a block"
            f" ({_percent(tally.enough_seconds, tally.seconds)} of the time)",
            _percent(tally.covered_enough_seconds, tally.enough_seconds),
        ),
        ("gaps: number, longest", f"{len(tally.gaps)}, {max(tally.gaps, default=0):.0f} s"),
        ("bottleneck / bound, over time", f"{tally.bottleneck / tally.optimum:.3f}"),
        (
            "bottleneck / bound, p5 and worst quarter hour",
            f"{_quantile(tally.ratios, 0.05):.3f}, {min(tally.ratios):.3f}",
        ),
        ("placing all anew / bound", f"{statistics.mean(tally.replaced):.3f}"),
        (
            "joins, ends, moves, refused moves",
            f"{tally.joins}, {tally.ends}, {tally.moves}, {tally.refused_moves}",
        ),
        ("moves per server-hour", f"{tally.moves / tally.server_hours:.5f}"),
        ("moves that uncovered a block", str(tally.uncovered_by_moves)),
        (
            "choosing blocks, median / p95",
            f"{1000 * _quantile(tally.place_seconds, 0.5):.1f} /"
            f" {1000 * _quantile(tally.place_seconds, 0.95):.1f} ms",
        ),
        (
            f"a look at moving ({num_looks}), median / p99",
            f"{1000 * _quantile(tally.look_seconds, 0.5):.3f} /"
            f" {1000 * _quantile(tally.look_seconds, 0.99):.3f} ms",
        ),
    ]
    title = (
        f"### {scenario.num_servers} servers, {hours:.0f} h, moves {moves}, seed {scenario.seed}"
    )
    if scenario.shock_at is not None:
        title += f", shock at {scenario.shock_at:g} h"
    lines = [title, "", f"Took {wall_seconds:.0f} s.", "", "| what | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if scenario.shock_at is not None:
        lines += ["", _after_shock(scenario, tally)]
    if tally.routes:
        lines += ["", *_describe_routes(tally)]
    return "\n".join(lines) + "\n"


def _after_shock(scenario: Scenario, tally: Tally) -> str:
    assert scenario.shock_at is not None
    after = [
        (hour - scenario.shock_at, r) for hour, r in tally.timeline if hour > scenario.shock_at
    ]
    shown = ", ".join(f"{hour:.2f} h: {ratio:.2f}" for hour, ratio in after[:16])
    return f"Bottleneck / bound after the shock: {shown}."


def _describe_routes(tally: Tally) -> list[str]:
    lines = [
        "| what the client knows | KB / minute | route cost / cheapest, median | p95 | hops"
        " | dead hops | no route | finding it, median / p95 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, routes in tally.routes.items():
        read = tally.directory.get(name.partition(";")[0])
        num_bytes = f"{statistics.mean(read) / 1000:.0f}" if read else "-"
        num_found = max(1, len(routes.seconds))
        lines.append(
            f"| {name} | {num_bytes} | {_quantile(routes.ratios, 0.5):.2f}"
            f" | {_quantile(routes.ratios, 0.95):.2f} | {routes.num_hops / num_found:.1f}"
            f" | {_percent(routes.num_dead_hops, routes.num_hops)} | {routes.num_missing}"
            f" | {1000 * _quantile(routes.seconds, 0.5):.1f} /"
            f" {1000 * _quantile(routes.seconds, 0.95):.1f} |"
        )
    return lines


def simulate(scenario: Scenario) -> tuple[Tally, str]:
    """Run a scenario; what was seen, and the same in Markdown."""
    began = time.perf_counter()
    tally = Simulation(scenario).run()
    return tally, describe(scenario, tally, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[10, 30, 100, 1000])
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--churn", type=float, default=0.1, help="per server and hour")
    parser.add_argument("--shock-at", type=float, help="hour")
    parser.add_argument("--no-moves", action="store_true")
    parser.add_argument("--routes", type=int, default=20, help="route samples")
    parser.add_argument("--holders", type=float, default=4.0, help="mean holders of a block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the report to this file")
    args = parser.parse_args()
    for num_servers in args.servers:
        scenario = Scenario(
            num_servers=num_servers,
            hours=args.hours,
            num_blocks=args.blocks,
            churn_per_hour=args.churn,
            shock_at=args.shock_at,
            policy=None if args.no_moves else MovePolicy(),
            num_route_samples=args.routes,
            holders_worth=args.holders,
            seed=args.seed,
        )
        _, report = simulate(scenario)
        print(report, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(report + "\n")


if __name__ == "__main__":
    main()
