"""The walk of a token in ARCHITECTURE.md, beside what really runs while one token is decoded."""

import re
from pathlib import Path

import pytest
import torch

from petals.testing.in_process_swarm import InProcessSwarm
from petals.types import BlockSpan
from support.traced_calls import CalledFiles

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
MAX_NAMED = 15
MAX_TOUCHED = 36
"""Files that may run code for every decoded token, at the client and at all servers together."""

PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])
NUM_TOKENS = 8


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
def steps(llama: Path) -> list[list[str]]:
    """For each decode step the files that ran code, in the order of their first calls."""
    files = CalledFiles()
    with files.installed(), InProcessSwarm(llama, BlockSpan(0, 2), BlockSpan(2, 5)) as swarm:
        streamer = OneStepAtATime(files)
        model = swarm.model()
        with model.inference_session(max_length=32) as session:
            model.generate(PROMPT, session=session, max_new_tokens=NUM_TOKENS, streamer=streamer)
    # The first call brings the prompt, the second the token after it: what follows is decoding.
    assert len(streamer.steps) == 1 + NUM_TOKENS
    return streamer.steps[2:]


@pytest.fixture(scope="module")
def touched(steps: list[list[str]]) -> set[str]:
    """Files that run code in every step; heartbeats and announcements, which do not, are no part of
    a token.
    """
    always = set.intersection(*map(set, steps))
    return {name for name in always if not name.startswith("testing/")}


@pytest.fixture(scope="module")
def walk() -> list[str]:
    """The files that the section names, in its order."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.partition("## A token\n")[2].partition("\n## ")[0]
    return list(dict.fromkeys(re.findall(r"`((?:\w+/)+\w+\.py)`", section)))


def test_every_file_of_the_walk_runs(walk: list[str], touched: set[str]) -> None:
    assert 5 < len(walk) <= MAX_NAMED
    assert [name for name in walk if name not in touched] == []


def test_the_walk_is_in_the_order_of_the_calls(walk: list[str], steps: list[list[str]]) -> None:
    # In some steps a server still does the book-keeping of the step before.
    assert any(walk == sorted(walk, key=step.index) for step in steps)


def test_a_token_touches_few_files(touched: set[str]) -> None:
    print(f"{len(touched)} files run code for one decoded token: {', '.join(sorted(touched))}")
    assert len(touched) <= MAX_TOUCHED
