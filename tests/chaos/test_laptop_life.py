"""Machines that people carry about: each is back within a minute, with the same words."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from chaos.laptop import SERVER_OPTIONS
from chaos.runner import Runner
from chaos.schedule import LAPTOP_LIFE, Fault, FaultKind, Phase, Scenario
from chaos.swarms import open_runner

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("laptop")
        yield open_runner("bloom", stack, folder=folder, options=SERVER_OPTIONS)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", LAPTOP_LIFE, ids=lambda kind: kind.name.lower())
def test_back_within_a_minute(runner: Runner, kind: FaultKind) -> None:
    fault = Fault(kind, 1, 0.4)
    outcome = runner.run(Scenario(0, LAPTOP_LIFE.index(kind), "bloom", Phase.DECODE, (fault,)))
    assert not outcome.problems, "\n".join([str(outcome.scenario), *outcome.problems])
    assert outcome.landed, outcome.scenario
    if kind is FaultKind.OTHER_HARDWARE:
        # The trace says why the words could have been others.
        assert any("1 thread; now" in n and "2 threads" in n for n in outcome.notes), outcome.notes
