"""What a placement could reach."""

from collections.abc import Iterable

import numpy as np

from petals.server import placement
from simulation.scenario import Server


def placed_anew(servers: Iterable[Server], num_blocks: int) -> float:
    """Bottleneck if all servers were placed at once, the largest first: one can have that."""
    served = np.zeros(num_blocks)
    for server in sorted(servers, key=lambda s: -s.throughput / s.capacity):
        blocks = placement.choose_span(served, server.capacity)
        served[blocks.start : blocks.end] += server.throughput / server.capacity
    return float(served.min())
