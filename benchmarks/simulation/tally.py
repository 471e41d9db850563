"""What was seen while a scenario happened: numbers only."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """What was seen after the warm-up. Seconds of simulated time unless said otherwise.

    ``flow``: what the weakest block gets if clients go where queues are short, ``even`` the same if
    each server divides its passes evenly; shares of the bound, one each quarter of an hour.
    ``best_…``: of the best placement found for those who were alive.
    """

    seconds: float = 0.0
    enough_seconds: float = 0.0
    covered_seconds: float = 0.0
    covered_enough_seconds: float = 0.0
    server_hours: float = 0.0
    joins: int = 0
    ends: int = 0
    moves: int = 0
    refused_moves: int = 0
    uncovered_by_moves: int = 0
    gaps: list[float] = field(default_factory=list)
    flow: list[float] = field(default_factory=list)
    even: list[float] = field(default_factory=list)
    best_flow: list[float] = field(default_factory=list)
    best_even: list[float] = field(default_factory=list)
    flow_to_best: list[float] = field(default_factory=list)
    even_to_best: list[float] = field(default_factory=list)
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
