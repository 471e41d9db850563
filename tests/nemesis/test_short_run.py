"""A short run with a fixed schedule; `make nemesis` runs long ones."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from nemesis.schedule import Fault, Phase, Scene, Strike
from nemesis.stages import SPANS, open_director

SCENES = (
    # The first server that is stopped is looked at again when its lease is over: begin with it.
    (Phase.DECODE, (Strike(Fault.PAUSE, 1, 0.3, lasts=4),)),
    (Phase.PREFILL, (Strike(Fault.KILL, 1, 0.4),)),
    (Phase.ROLLBACK, (Strike(Fault.KILL, 2, 0.4),)),
    (Phase.BEAMS, (Strike(Fault.KILL, 1, 0.5, delay=0.4),)),
    (Phase.BATCH, (Strike(Fault.SERVER_DAEMON, 0, 0.4),)),
    (Phase.CROWD, (Strike(Fault.KILL, 0, 0.3), Strike(Fault.KILL, 2, 0.3))),
    (Phase.TRAINING, (Strike(Fault.KILL, 1, 0.3, delay=0.5),)),
    (Phase.ROLLBACK, (Strike(Fault.LEAVE, 1, 0.3),)),
    (Phase.BEAMS, (Strike(Fault.CLIENT_DAEMON, 0, 0.4),)),
    (Phase.DECODE, (Strike(Fault.BOOTSTRAP, 0, 0.4),)),
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(600)
def test_tiny_bloom_survives(tmp_path: Path) -> None:
    with ExitStack() as stack:
        director = open_director("bloom", stack, folder=tmp_path)
        for number, (phase, strikes) in enumerate(SCENES):
            outcome = director.play(Scene(0, number, "bloom", phase, strikes))
            assert not outcome.problems, "\n".join([str(outcome.scene), *outcome.problems])
            assert outcome.landed, outcome.scene
        assert not director.settle()


@pytest.mark.timeout(300)
def test_smollm2_survives_a_kill(tmp_path: Path) -> None:
    with ExitStack() as stack:
        director = open_director("smollm2", stack, folder=tmp_path, spares=(SPANS["smollm2"][1],))
        scene = Scene(0, 0, "smollm2", Phase.DECODE, (Strike(Fault.KILL, 1, 0.4),))
        outcome = director.play(scene)
        assert not outcome.problems, "\n".join([str(scene), *outcome.problems])
        assert outcome.landed
