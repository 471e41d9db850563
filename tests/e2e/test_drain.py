"""`petals drain` in the middle of a generation: the tokens stay the same and come in time."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals import AutoDistributedModelForCausalLM
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm
from petals.types import BlockSpan
from support.streamers import AtToken

NUM_NEW, NUM_MORE = 28, 6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A prompt of more than 600 tokens."""
    text = "The old lighthouse keeper looked at the sea and wrote down what he saw. " * 38
    return tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def expected(smollm2_local: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return smollm2_local.generate(ids, max_new_tokens=NUM_NEW + NUM_MORE, do_sample=False)[0]


@pytest.fixture(scope="module")
def swarm(smollm2_swarm: LocalSwarm) -> LocalSwarm:
    """Its first two spans have a second server, so that the first can leave."""
    smollm2_swarm.add_servers(BlockSpan(0, 10), BlockSpan(10, 20))
    return smollm2_swarm


@pytest.mark.parametrize("hop", [0, 1])
def test_a_long_sentence_outlives_a_drained_server(
    smollm2_path: Path,
    smollm2_local: PreTrainedModel,
    swarm: LocalSwarm,
    ids: torch.Tensor,
    expected: torch.Tensor,
    hop: int,
) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(smollm2_path), initial_peers=list(swarm.initial_peers), dtype=torch.float32
    )
    with model.inference_session(max_length=len(expected) + 8) as session:
        victims, commands = [], []

        def drain() -> None:
            victims.append(swarm.server(session.trace.hops[hop].peer_id))
            words = [sys.executable, "-m", "petals.cli", "drain", str(victims[0].pid)]
            commands.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))

        streamer = AtToken(5, drain)
        first = model.generate(
            ids, session=session, max_new_tokens=NUM_NEW, do_sample=False, streamer=streamer
        )
        # The session is still open: the server leaves because it has been handed over.
        ((victim,), (command,)) = victims, commands
        _, told = command.communicate(timeout=55)
        assert f"Server {victim.pid} has left." in told
        assert victim.peer_id not in {hop.peer_id for hop in session.trace.hops}
        (repair,) = session.trace.repairs
        gaps = [after - before for before, after in pairwise(streamer.times[1:])]
        print(
            f"\ndrain of hop {hop} at context {ids.shape[1]}: longest gap {max(gaps):.3f} s, "
            f"median {median(gaps):.3f} s; the change took {repair.stall_seconds:.3f} s of it"
        )
        assert repair.reason == "The server leaves."
        more = model.generate(None, session=session, max_new_tokens=NUM_MORE, do_sample=False)
        assert_same_tokens(smollm2_local, expected, torch.cat([first[0], more[0]]))
    swarm.end(victim)
    model.remote_blocks.sequence_manager.shutdown()
