"""The record store of a simulated swarm, as its readers find it."""

import math
from types import MappingProxyType

from petals.server.lifecycle import placement
from petals.server.lifecycle.placement import Coverage
from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord, View
from petals.swarm.identity import Identity
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from simulation.scenario import MODEL, Scenario, Server


class Directory:
    """Records as readers find them: late by up to the lag, and the dead until they expire."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.records: dict[PeerId, ServerRecord] = {}
        self._view: View | None = None
        self._coverage: Coverage | None = None

    def put(
        self,
        server: Server,
        state: ServerState,
        throughput: float,
        heads_for: BlockSpan | None = None,
    ) -> None:
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
            next_spans=() if heads_for is None else ((heads_for.start, heads_for.end),),
        )

    def view(self, now: float, lag: float | None = None) -> View:
        lag = self.scenario.lag_seconds if lag is None else lag
        if self._view is None or now - self._view.taken_at > lag:
            known = MappingProxyType(dict(self.records))
            self._view = View(ModelId(MODEL), self.scenario.num_blocks, known, now)
            self._coverage = None
        return self._view

    def coverage(self, now: float, lag: float | None = None) -> tuple[View, Coverage]:
        """All readers of one moment see the same, so it is worked out once."""
        view = self.view(now, lag)
        if self._coverage is None:
            self._coverage = placement.coverage_of(view)
        return view, self._coverage


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
        max_length=8192,
        cache_tokens=65536,
        version="3.0.0",
        protocol_version=1,
        addresses=tuple(f"/ip4/203.0.113.{n}/tcp/31337/p2p/{peer_id}" for n in range(2)),
    )
    return len(records.seal(record, identity)) + len(peer_id) + 16


RECORD_BYTES = _record_bytes()
