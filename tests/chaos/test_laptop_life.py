"""Machines that people carry about: each is back within a minute, with the same words."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from chaos.laptop import SERVER_OPTIONS
from chaos.runner import Runner
from chaos.schedule import LAPTOP_LIFE, Fault, FaultKind, Phase, Scenario
from chaos.swarms import open_runner

SHORT = (FaultKind.LAPTOP_SLEEP, FaultKind.RESTARTS_WITH_IDENTITY, FaultKind.OTHER_HARDWARE)
"""The widest of each sort; ``make chaos LAPTOP=1`` plays all."""

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("laptop")
        yield open_runner("bloom", stack, folder=folder, options=SERVER_OPTIONS)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.name.lower())
def test_back_within_a_minute(runner: Runner, kind: FaultKind) -> None:
    fault = Fault(kind, 1, 0.4)
    outcome = runner.run(Scenario(0, LAPTOP_LIFE.index(kind), "bloom", Phase.DECODE, (fault,)))
    assert not outcome.problems, "\n".join([str(outcome.scenario), *outcome.problems])
    assert outcome.landed, outcome.scenario
    if kind is FaultKind.OTHER_HARDWARE:
        # The trace says why the words could have been others.
        assert any("1 thread; now" in n and "2 threads" in n for n in outcome.notes), outcome.notes


@pytest.mark.timeout(400)
def test_another_address() -> None:
    """In a network namespace of its own, which only root can make."""
    words = "--laptop --faults ADDRESS --phases DECODE --models bloom --runs 1".split()
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "chaos", *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300.0,
        check=False,
    )
    if os.geteuid() != 0:
        assert done.returncode == 2 and "Only root" in done.stderr
        return
    assert done.returncode == 0 and "1 runs" in done.stdout, done.stdout + done.stderr
