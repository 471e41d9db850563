"""The schedule is repeatable and complete."""

from chaos.laptop import SLEEP_SECONDS
from chaos.runner import MAX_STALL_SECONDS, long_stalls
from chaos.schedule import (
    LAPTOP_LIFE,
    ON_NETWORK,
    ON_PROCESSES,
    PAIRABLE,
    TWO_AT_ONCE,
    Fault,
    FaultKind,
    Phase,
    ScenarioSpace,
    draw,
)

SPACE = ScenarioSpace(model="tiny", num_hops=3, kinds=ON_PROCESSES)
NUM_PAIRS = (len(ON_PROCESSES) + 1) * len(Phase)


def test_a_scenario_follows_from_seed_and_number() -> None:
    assert [draw(SPACE, 7, n) for n in range(20)] == [draw(SPACE, 7, n) for n in range(20)]
    assert [draw(SPACE, 7, n) for n in range(20)] != [draw(SPACE, 8, n) for n in range(20)]


def test_a_round_holds_every_fault_in_every_phase() -> None:
    scenarios = [draw(SPACE, 1, number) for number in range(2 * NUM_PAIRS)]
    for round_ in (scenarios[:NUM_PAIRS], scenarios[NUM_PAIRS:]):
        assert len({(scenario.label, scenario.phase) for scenario in round_}) == NUM_PAIRS
    assert [s.label for s in scenarios[:NUM_PAIRS]] != [s.label for s in scenarios[NUM_PAIRS:]]


def test_two_at_once_hit_two_hops_in_the_same_step() -> None:
    scenarios = [draw(SPACE, 3, number) for number in range(NUM_PAIRS)]
    pairs = [scenario.faults for scenario in scenarios if scenario.label == TWO_AT_ONCE]
    assert len(pairs) == len(Phase)
    for one, other in pairs:
        assert one.hop != other.hop and one.at == other.at
        assert {one.kind, other.kind} <= set(PAIRABLE)


def test_a_stall_that_the_faults_do_not_explain_is_a_failure() -> None:
    kill, sleep = (Fault(kind, 0, 0.5) for kind in (FaultKind.KILL, FaultKind.CLIENT_SLEEP))
    stalls = [0.1, 1.5 * MAX_STALL_SECONDS]
    assert list(long_stalls(stalls, [kill])) == [f"client 1 waited {stalls[1]:.1f} s"]
    assert list(long_stalls(stalls, [kill, kill])) == []
    assert list(long_stalls([SLEEP_SECONDS + 1.0], [sleep])) == []


def test_every_fault_is_of_one_place() -> None:
    groups = (set(ON_PROCESSES), set(ON_NETWORK), set(LAPTOP_LIFE))
    assert sorted(kind for group in groups for kind in group) == sorted(FaultKind)
