"""`petals drain` in the middle of a sentence: the words stay the same and nobody waits for them."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals import AutoDistributedModelForCausalLM
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalServer, LocalSwarm
from petals.types import BlockSpan

NUM_NEW, NUM_MORE = 28, 6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class DrainAfter:
    """A streamer that drains the server of one hop at its ``count``-th call, and looks on."""

    def __init__(self, swarm: LocalSwarm, session: object, hop: int, count: int) -> None:
        self._swarm, self._session, self._hop, self._count = swarm, session, hop, count
        self.victim: LocalServer | None = None
        self.command: subprocess.Popen[str] | None = None
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == self._count:
            peer_id = self._session.trace.hops[self._hop].peer_id
            self.victim = next(s for s in self._swarm.servers if s.peer_id == peer_id)
            words = [sys.executable, "-m", "petals.cli", "drain", str(self.victim.pid)]
            self.command = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def end(self) -> None:
        assert self.command is not None

    def tell(self, context: int, between: float) -> None:
        """How long the reader waited for a word at worst, and normally."""
        gaps = [after - before for before, after in zip(self.times, self.times[1:])][1:]
        print(
            f"\ndrain of hop {self._hop} at context {context}: longest gap {max(gaps):.3f} s, "
            f"median {median(gaps):.3f} s; the change took {between:.3f} s of it"
        )


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A prompt of more than 600 tokens."""
    text = "The old lighthouse keeper looked at the sea and wrote down what he saw. " * 38
    return tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def expected(smollm2_local: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return smollm2_local.generate(ids, max_new_tokens=NUM_NEW + NUM_MORE, do_sample=False)[0]


@pytest.mark.parametrize("hop", [0, 1])
def test_a_long_sentence_outlives_a_drained_server(
    smollm2_path: Path,
    smollm2_local: PreTrainedModel,
    smollm2_swarm: LocalSwarm,
    ids: torch.Tensor,
    expected: torch.Tensor,
    hop: int,
) -> None:
    swarm = smollm2_swarm
    swarm.add_server(BlockSpan(10 * hop, 10 * hop + 10))
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(smollm2_path), initial_peers=list(swarm.initial_peers), dtype=torch.float32
    )
    with model.inference_session(max_length=len(expected) + 8) as session:
        drain = DrainAfter(swarm, session, hop, count=5)
        first = model.generate(
            ids, session=session, max_new_tokens=NUM_NEW, do_sample=False, streamer=drain
        )
        assert drain.command is not None and drain.victim is not None
        # The session is still open: the server leaves because it has been handed over.
        _, told = drain.command.communicate(timeout=55)
        assert f"Server {drain.victim.pid} has left." in told
        assert drain.victim.peer_id not in {h.peer_id for h in session.trace.hops}
        (repair,) = session.trace.repairs
        drain.tell(ids.shape[1], repair.stall_seconds)
        assert repair.reason == "The server leaves."
        more = model.generate(None, session=session, max_new_tokens=NUM_MORE, do_sample=False)
        assert_same_tokens(smollm2_local, expected, torch.cat([first[0], more[0]]))
    swarm.servers.remove(drain.victim)
    model.remote_blocks.sequence_manager.shutdown()
