"""A short run with a fixed schedule; `make chaos` runs long ones."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.schedule import Fault, FaultKind, Phase, Scenario
from chaos.swarms import open_runner

SCHEDULE = (
    # What these two leave behind is checked when its lease is over: begin with them.
    (Phase.BEAMS, (Fault(FaultKind.CLIENT_DAEMON, 0, 0.4),)),
    (Phase.DECODE, (Fault(FaultKind.PAUSE, 1, 0.3, lasts=4),)),
    (Phase.PREFILL, (Fault(FaultKind.KILL, 1, 0.4),)),
    (Phase.ROLLBACK, (Fault(FaultKind.KILL, 2, 0.4),)),
    (Phase.BEAMS, (Fault(FaultKind.KILL, 1, 0.5, delay=0.4),)),
    (Phase.BATCH, (Fault(FaultKind.SERVER_DAEMON, 0, 0.4),)),
    (Phase.CROWD, (Fault(FaultKind.KILL, 0, 0.3), Fault(FaultKind.KILL, 2, 0.3))),
    (Phase.TRAINING, (Fault(FaultKind.KILL, 1, 0.3, delay=0.5),)),
    (Phase.ROLLBACK, (Fault(FaultKind.LEAVE, 1, 0.3),)),
    (Phase.DECODE, (Fault(FaultKind.BOOTSTRAP, 0, 0.4),)),
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.timeout(600)
def test_a_swarm_survives(tmp_path: Path) -> None:
    with ExitStack() as stack:
        runner = open_runner("bloom", stack, folder=tmp_path)
        for number, (phase, faults) in enumerate(SCHEDULE):
            outcome = runner.run(Scenario(0, number, "bloom", phase, faults))
            assert not outcome.problems, "\n".join([str(outcome.scenario), *outcome.problems])
            assert outcome.landed, outcome.scenario
        assert not runner.leaks_after_leases()
        # A server that dies without a fault is a problem, not one that is replaced silently.
        runner.cluster.servers[0].process.kill()
        (problem,) = runner.cluster.remove_crashed()
        assert "ended by itself" in problem
