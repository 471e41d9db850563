"""Real swarms for the end-to-end tests: one for each model, started once, shared by its tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from petals import AutoDistributedModelForCausalLM
from petals.demo.model import get_demo_model
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.types import BlockSpan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in this folder starts processes."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return get_demo_model("smollm2")


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_local(smollm2_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


def swarm_of(model: Path, *spans: tuple[int, int]) -> LocalSwarm:
    """Servers of one thread each, in f32."""
    config = LocalSwarmConfig(
        model=str(model),
        spans=tuple(BlockSpan(*span) for span in spans),
        dtype="float32",
        num_threads=1,
    )
    return LocalSwarm(config)


@pytest.fixture(scope="session")
def smollm2_swarm(smollm2_path: Path) -> Iterator[LocalSwarm]:
    with swarm_of(smollm2_path, (0, 10), (10, 20), (20, 30)) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path, smollm2_swarm: LocalSwarm) -> PreTrainedModel:
    """The distributed model, one client for all tests."""
    return AutoDistributedModelForCausalLM.from_pretrained(
        str(smollm2_path), initial_peers=list(smollm2_swarm.initial_peers), dtype=torch.float32
    )
