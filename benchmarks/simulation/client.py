"""Somebody who reads the directory in some way and wants a route."""

import math
import time
from dataclasses import dataclass

import msgspec
import numpy as np

from petals.client.routing import HOP_OVERHEAD_SECONDS, Candidate, Needs, find_route
from petals.errors import MissingBlocksError
from petals.swarm import records
from petals.swarm.records import ServerRecord
from petals.types import BlockSpan, PeerId, Route, ServerState
from simulation.directory import RECORD_BYTES
from simulation.scenario import MODEL, REGION_MS, REGION_SHARES, Server
from simulation.swarm import Simulation
from simulation.tally import Routes, Tally


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


def measure_routes(simulation: Simulation) -> None:
    """Somebody, somewhere, reads the directory in several ways; how good are the routes?"""
    _Client(simulation).measure(simulation.tally)


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
