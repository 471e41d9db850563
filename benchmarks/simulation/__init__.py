"""A swarm in simulated time: the product's own decisions among servers that are made up.

Placement, rebalancing, routing and the directory's sharding are the product's pure functions; time,
chance, the servers and the record store are made up here. ``scenario`` says what happens, ``swarm``
lets it happen, ``directory`` is what readers find, ``client`` reads and routes, ``optimum`` is what
a placement could reach at best, ``tally`` and ``report`` are what was seen.
"""

from simulation.client import measure_routes
from simulation.scenario import Scenario
from simulation.swarm import Simulation
from simulation.tally import Tally

__all__ = ["Scenario", "Simulation", "Tally", "run"]


def run(scenario: Scenario) -> Tally:
    """Let the scenario happen, clients asking for routes now and then; what was seen."""
    return Simulation(scenario, on_sample=measure_routes).run()
