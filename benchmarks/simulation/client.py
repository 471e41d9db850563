"""Somebody who reads the directory in some way and wants a route."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import msgspec
import numpy as np

from petals.client.routing.route import HOP_OVERHEAD_SECONDS, Candidate, Needs, find_route
from petals.errors import MissingBlocksError
from petals.swarm.directory.directory import MORE_SHARDS, records
from petals.swarm.directory.records import ServerRecord
from petals.swarm.directory.shard_reader import Reading
from petals.types import BlockSpan, PeerId, Route, ServerState
from simulation.directory import RECORD_BYTES
from simulation.scenario import MODEL, REGION_MS, REGION_SHARES, Server
from simulation.swarm import Simulation
from simulation.tally import Routes, Tally

Store = dict[str, list[ServerRecord]]
Choose = Callable[[list[ServerRecord], frozenset[PeerId]], frozenset[PeerId]]

MAX_MEASURED = 32
"""Servers whose round trip is measured after each reading, as the client does."""

MINUTES = 5


def measure_routes(simulation: Simulation) -> None:
    """Somebody, somewhere, reads the directory in several ways; how good are the routes?"""
    _Client(simulation).measure(simulation.tally)


def stored(online: list[ServerRecord]) -> Store:
    """The records under the keys that their servers would choose."""
    populations = Counter(b for record in online for b in records.buckets_of(record.block_spans))
    bits = records.shard_bits_for(max(populations.values()))
    store: Store = defaultdict(list)
    for record in online:
        placed = msgspec.structs.replace(record, shard_bits=bits)
        for key in records.keys_to_store(placed):
            store[key].append(placed)
    return store


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
        store = stored(online)
        self._live(f"first {MAX_MEASURED}", self._first, store, best)
        self._live(f"guided {MAX_MEASURED}", self._guided, store, best)
        self._live("all", self._all, store, best)

    def _live(self, name: str, choose: Choose, store: Store, best: float) -> None:
        """Read the directory each minute, measure some servers each time, look for routes."""
        tally, reading, measured = self.simulation.tally, Reading(MODEL, self.seed), set[PeerId]()
        num_bytes = 0
        for minute in range(MINUTES):
            num_bytes += self._read(reading, store, 60.0 * minute) * RECORD_BYTES
            known = list({r.peer_id: r for r in reading.known(60.0 * minute)}.values())
            measured |= choose(known, frozenset(measured))
            if minute in (0, MINUTES - 1):
                row = f"read for {minute + 1} min, {name} measured each time"
                tally.directory.setdefault(row, []).append(num_bytes / (minute + 1))
                self._try(row, known, frozenset(measured), best, tally)

    def _read(self, reading: Reading, store: Store, now: float) -> int:
        """What ``Directory.view`` does; how many records came."""
        buckets, num_read = range(-(-self.num_blocks // records.BLOCKS_PER_BUCKET)), 0
        rounds = [
            lambda: reading.samples_due(buckets, now),
            lambda: reading.next_shards(buckets),
            *[lambda: reading.more(self.num_blocks, now)] * MORE_SHARDS,
        ]
        for wanted in rounds:
            found = {key: store.get(key, []) for key in wanted()}
            num_read += sum(map(len, found.values()))
            reading.keep(found, now)
        return num_read

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

    # -- whom to measure -----------------------------------------------------------------------

    def _all(self, read: list[ServerRecord], measured: frozenset[PeerId]) -> frozenset[PeerId]:
        """More than anybody would: what a client could find in what it has read."""
        return frozenset(PeerId(record.peer_id) for record in read)

    def _first(self, read: list[ServerRecord], measured: frozenset[PeerId]) -> frozenset[PeerId]:
        """As the client does: some of every block, the unmeasured first, until the limit."""
        chosen: dict[PeerId, None] = {}
        for block in range(self.num_blocks):
            chosen |= dict.fromkeys(self._some_holders(read, block, measured))
            if len(chosen) >= MAX_MEASURED:
                break
        return frozenset(list(chosen)[:MAX_MEASURED])

    def _guided(self, read: list[ServerRecord], measured: frozenset[PeerId]) -> frozenset[PeerId]:
        """A few at random, then always the hops of the best route so far that are not measured."""
        unknown = [PeerId(r.peer_id) for r in read if r.peer_id not in measured]
        new = set(self.rng.sample(unknown, min(len(unknown), MAX_MEASURED // 4)))
        while len(new) < MAX_MEASURED:
            table = [self._candidate(record, measured | new) for record in read]
            try:
                route = find_route(table, Needs(blocks=BlockSpan(0, self.num_blocks)))
            except MissingBlocksError:
                break
            ahead = [hop.peer_id for hop in route if hop.peer_id not in measured | new]
            ahead = [peer_id for peer_id in ahead if peer_id in self.simulation.servers]
            if not ahead:
                break
            new |= set(ahead[: MAX_MEASURED - len(new)])
        return frozenset(new)

    def _some_holders(
        self, read: list[ServerRecord], block: int, measured: frozenset[PeerId]
    ) -> list[PeerId]:
        holders = [PeerId(record.peer_id) for record in read if record.holds(block)]
        self.rng.shuffle(holders)
        return sorted(holders, key=measured.__contains__)[:3]
