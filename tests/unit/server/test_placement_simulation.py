"""Small swarms under churn, in simulated time, with the simulator that the benchmark uses."""

import statistics

import pytest

from petals.server.policies import MovePolicy
from simulation import Scenario, run


def test_a_swarm_with_spares_stays_whole() -> None:
    scenario = Scenario(
        num_servers=60,
        hours=4,
        num_blocks=24,
        num_route_samples=2,
        seed=1,
        holders_worth=6,
        search_rounds=0,
    )
    tally = run(scenario)
    assert tally.joins > 10 and tally.ends > 10
    assert tally.covered_seconds == tally.seconds == pytest.approx(4 * 3600, abs=60)
    assert tally.uncovered_by_moves == 0
    assert 0.7 < statistics.mean(tally.flow) <= 1.0
    assert all(even <= flow * 1.01 for even, flow in zip(tally.even, tally.flow))
    assert all(routes.num_missing == 0 for routes in tally.routes.values())
    assert min(tally.routes["everything known and measured"].ratios) >= 1.0 - 1e-9


def test_moves_close_a_gap_that_nobody_comes_to_close() -> None:
    """After the shock one server comes an hour; what is left must spread by itself."""

    def gaps(policy: MovePolicy | None) -> float:
        scenario = Scenario(
            num_servers=40,
            hours=3,
            num_blocks=24,
            churn_per_hour=0.001,
            shock_at=0.5,
            shock_share=1.0,
            num_route_samples=0,
            search_rounds=0,
            policy=policy,
        )
        tally = run(scenario)
        assert tally.uncovered_by_moves == 0
        return 1.0 - tally.covered_seconds / tally.seconds

    assert gaps(None) > 0.4
    assert 0.0 < gaps(MovePolicy()) < 0.2


def test_a_calm_swarm_does_not_move() -> None:
    scenario = Scenario(
        num_servers=200,
        hours=2,
        num_blocks=24,
        churn_per_hour=0.001,
        num_route_samples=0,
        search_rounds=0,
    )
    assert run(scenario).moves == 0
