"""The walk of a token in ARCHITECTURE.md, beside what really runs while one token is decoded."""

import re
from functools import reduce
from pathlib import Path

import pytest
import torch

from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.model_swarm import model_swarm
from support.traced_calls import CalledFiles

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
MAX_NAMED = 15
MAX_TOUCHED = 60
"""Files that may run code for every decoded token, at the client and at all servers together."""

PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])
NUM_STEPS = 6


class OneStepAtATime:
    """A streamer: `generate` calls it with each token; between two calls lies one decode step."""

    def __init__(self, files: CalledFiles) -> None:
        self.steps: list[list[str]] = []
        self._files = files

    def put(self, value: torch.Tensor) -> None:
        self._files.is_on = False
        self.steps.append(self._files.take())
        self._files.is_on = True

    def end(self) -> None:
        self._files.is_on = False


@pytest.fixture(scope="module")
def touched(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files that run code in every decode step, in the order of their first calls.

    What only some steps run (heartbeats, announcements) belongs to no token.
    """
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")
    files = CalledFiles()
    with files.installed(), model_swarm(folder, BlockSpan(0, 2), BlockSpan(2, 5)) as swarm:
        streamer = OneStepAtATime(files)
        model = swarm.client()
        with model.inference_session(max_length=32) as session:
            model.generate(PROMPT, session=session, max_new_tokens=NUM_STEPS, streamer=streamer)
    # The first call brings the prompt, the second the token after it: what follows is decoding.
    steps = streamer.steps[2:]
    assert len(steps) >= NUM_STEPS - 2
    always = reduce(set.intersection, map(set, steps))
    return [name for name in steps[0] if name in always and not name.startswith("testing/")]


@pytest.fixture(scope="module")
def walk() -> list[str]:
    """The files that the section names, in its order."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.partition("### A token\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    return list(dict.fromkeys(re.findall(r"`((?:\w+/)+\w+\.py)`", section)))


def test_every_file_of_the_walk_runs(walk: list[str], touched: list[str]) -> None:
    assert 5 < len(walk) <= MAX_NAMED
    assert [name for name in walk if name not in touched] == []


def test_the_walk_is_in_the_order_of_the_calls(walk: list[str], touched: list[str]) -> None:
    assert walk == sorted(walk, key=touched.index)


def test_a_token_touches_few_files(touched: list[str]) -> None:
    print(f"{len(touched)} files run code for one decoded token: {', '.join(touched)}")
    assert len(touched) <= MAX_TOUCHED
