"""Scripts in the manner of the original's benchmarks and tests, with real servers and hivemind."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hivemind import DHT

from petals import AutoDistributedConfig, RemoteSequenceManager, RemoteSequential
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.reference import assert_close
from support.tiny_tokenizer import write_tokenizer

SCRIPT = Path(__file__).parents[1] / "support" / "original_script.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    write_tokenizer(folder)
    spans = (BlockSpan(0, 3), BlockSpan(3, 5))
    config = LocalSwarmConfig(model=str(folder), spans=spans, dtype="float32", num_threads=1)
    with LocalSwarm(config) as swarm:
        yield swarm


@pytest.mark.parametrize("task", ["inference", "forward", "training"])
def test_benchmarks_print_their_result(swarm: LocalSwarm, task: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), task, swarm.config.model, swarm.initial_peers[0]],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"Final result: speed=\d+\.\d\d", ran.stderr), ran.stderr


def test_a_swarm_joined_through_a_dht_of_hivemind(swarm: LocalSwarm) -> None:
    """As the original's tests begin; the config itself names no peers."""
    config = AutoDistributedConfig.from_pretrained(swarm.config.model)
    dht = DHT(initial_peers=list(swarm.initial_peers), client_mode=True, start=True)
    try:
        inputs = torch.randn(1, 4, config.hidden_size)
        whole = RemoteSequential(config, dht=dht)
        expected = whole[2:4](inputs)
        uids = [f"{config.dht_prefix}.{block}" for block in (2, 3)]
        with RemoteSequenceManager(config, uids, dht=dht) as manager:
            assert_close(RemoteSequential(config, sequence_manager=manager)(inputs), expected)
        part = RemoteSequential(config, dht=dht, start_block=2, end_block=4)
        assert_close(part(inputs), expected)
    finally:
        dht.shutdown()
