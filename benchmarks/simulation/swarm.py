"""Servers come, load, serve, look around, move, go and die: one thread, one queue of events."""

import heapq
import random
import time
from collections.abc import Callable
from itertools import count
from types import MappingProxyType

import numpy as np

from petals.server.lifecycle import placement, rebalancing
from petals.server.lifecycle.placement import Coverage
from petals.swarm.directory.records import View
from petals.types import BlockSpan, PeerId, ServerState
from simulation.directory import Directory
from simulation.optimum import best_placement, even_shares, most_flow
from simulation.scenario import HOUR, REGION_SHARES, Scenario, Server
from simulation.tally import Tally


class Simulation:
    """Runs one scenario; ``tally`` fills while it runs."""

    def __init__(
        self, scenario: Scenario, on_sample: "Callable[[Simulation], None]" = lambda _: None
    ) -> None:
        self.scenario = scenario
        self._on_sample = on_sample
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
            self._at(start + every * (number + 0.5), lambda: self._on_sample(self))
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
        served, strongest = np.zeros((2, self.scenario.num_blocks))
        for _ in range(self.scenario.num_servers):
            server = self._new_server()
            coverage = Coverage(served, strongest, strongest, self.holders, (), 1.0)
            server.blocks = placement.choose_blocks(coverage, server.capacity, server.throughput)
            window = slice(server.blocks.start, server.blocks.end)
            share = server.throughput / server.capacity
            served[window] += share
            strongest[window] = np.maximum(strongest[window], share)
            self._go_online(server)

    def _arrive_later(self) -> None:
        rate = self.scenario.churn_per_hour * self.scenario.num_servers
        self._at(self.now + self.rng.expovariate(rate) * HOUR, self._arrive)

    def _arrive(self) -> None:
        self._arrive_later()
        server = self._new_server()
        began = time.perf_counter()
        _, coverage = self.directory.coverage(self.now)
        server.blocks = placement.choose_blocks(coverage, server.capacity)
        self.directory.put(server, ServerState.JOINING, 0.0)
        if self.is_measuring:
            self.tally.joins += 1
            self.tally.place_seconds.append(time.perf_counter() - began)
        # Reading everything afresh for each of many thousands would only cost the simulation time.
        lag = 2.0 if self.scenario.num_servers <= 1000 else None
        view = self.directory.view(self.now, lag)
        if placement.must_yield(view, server.blocks, server.peer_id):
            coverage = self.directory.coverage(self.now)[1]
            if server.peer_id in view.records:
                coverage = placement.coverage_of(view, (server.peer_id,))
            server.blocks = placement.choose_blocks(coverage, server.capacity)
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
            server.state = rebalancing.begin(
                server.peer_id, self.now, len(self.servers), self.scenario.policy
            )
            self._at(server.state.next_look, lambda: self._look(server))

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
        state, policy = server.state, self.scenario.policy
        if not server.is_alive or not server.is_serving or state is None or policy is None:
            return
        view, coverage = self.directory.coverage(self.now)
        record = view.records.get(server.peer_id)
        if record is None or record.spans != ((server.blocks.start, server.blocks.end),):
            self._at(self.now + self.scenario.lag_seconds, lambda: self._look(server))
            return
        began = time.perf_counter()
        state, blocks = rebalancing.look(coverage, record, self.now, state, policy)
        if self.is_measuring:
            self.tally.look_seconds.append(time.perf_counter() - began)
        server.state = state
        if blocks is None:
            self._at(state.next_look, lambda: self._look(server))
            return
        self.directory.put(server, ServerState.DRAINING, server.throughput, blocks)
        self._at(self.now + self.scenario.settle_seconds, lambda: self._leave_for(server, blocks))

    def _leave_for(self, server: Server, blocks: BlockSpan) -> None:
        if not server.is_alive:
            return
        if not rebalancing.may_leave(self._answering(), server.peer_id):
            self.tally.refused_moves += self.is_measuring
            self.directory.put(server, ServerState.ONLINE, server.throughput)
            assert server.state is not None
            self._at(max(self.now, server.state.next_look), lambda: self._look(server))
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
        tally, num_blocks = self.tally, self.scenario.num_blocks
        serving = [server for server in self.servers.values() if server.is_serving]
        flow = most_flow(serving, num_blocks)
        tally.flow.append(flow / bound)
        tally.even.append(float(self.served.min()) / bound)
        tally.timeline.append((self.now / HOUR - self.scenario.warm_up_hours, flow / bound))
        if len(tally.flow) % 8 == 1:
            best = best_placement(self.servers.values(), num_blocks, self.scenario.search_rounds)
            best_even, best_flow = even_shares(best, num_blocks), most_flow(best, num_blocks)
            tally.best_flow.append(best_flow / bound)
            tally.flow_to_best.append(flow / best_flow)
            tally.best_even.append(best_even / bound)
            tally.even_to_best.append(float(self.served.min()) / best_even)
