"""A generation outlives a server that is killed and one that leaves; the tokens are the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalServer, LocalSwarm
from petals.types import BlockSpan
from support.streamers import AtToken

MIDDLE = BlockSpan(10, 20)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def swarm(smollm2_swarm: LocalSwarm) -> LocalSwarm:
    """Its middle span has a second server, so that the first can go."""
    smollm2_swarm.add_servers(MIDDLE)
    return smollm2_swarm


def test_kill_in_mid_sentence(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = tokenizer("The old lighthouse keeper looked at the sea and", return_tensors="pt")
    ids = prompt["input_ids"]
    expected = smollm2_local.generate(ids, max_new_tokens=24, do_sample=False)
    with smollm2.inference_session(max_length=ids.shape[1] + 24) as session:
        killed = []

        def kill() -> None:
            killed.append(session.trace.hops[1].peer_id)
            swarm.kill(swarm.server(killed[0]))

        actual = smollm2.generate(
            ids, session=session, max_new_tokens=24, do_sample=False, streamer=AtToken(9, kill)
        )
        assert_same_tokens(smollm2_local, expected[0], actual[0])
        assert [repair.peer_id for repair in session.trace.repairs] == killed


def petals_drain(server: LocalServer) -> None:
    """The command; it returns when the server has left."""
    words = [sys.executable, "-m", "petals.cli", "drain", str(server.pid)]
    ended = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=55, check=False)
    assert f"Server {server.pid} has left." in ended.stderr


def sigterm_to_the_group(server: LocalServer) -> None:
    """What a shell or a supervisor may send: to the server and to all that it has started."""
    os.killpg(server.pid, signal.SIGTERM)
    assert server.process.popen.wait(55) == 0
    log = server.log.read_text()
    assert "WARNING" not in log and "daemon" not in log


@pytest.mark.parametrize("leave", [petals_drain, sigterm_to_the_group])
def test_a_drained_server_hands_its_sessions_over(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
    leave: Callable[[LocalServer], None],
) -> None:
    """A server leaves in the middle of a long generation, which a later call continues."""
    text = "The old lighthouse keeper looked at the sea and wrote down what he saw. " * 38
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    num_new, num_more = 28, 6
    expected = smollm2_local.generate(ids, max_new_tokens=num_new + num_more, do_sample=False)[0]
    with (
        ThreadPoolExecutor(1) as helper,
        smollm2.inference_session(max_length=len(expected) + 8) as session,
    ):
        victims, work = [], []

        def drain() -> None:
            victims.append(swarm.server(session.trace.hops[1].peer_id))
            work.append(helper.submit(leave, victims[0]))

        streamer = AtToken(5, drain)
        first = smollm2.generate(
            ids, session=session, max_new_tokens=num_new, do_sample=False, streamer=streamer
        )
        # The session is still open: the server leaves because it has been handed over.
        ((victim,), (leaving,)) = victims, work
        leaving.result(60)
        assert victim.peer_id not in {hop.peer_id for hop in session.trace.hops}
        (repair,) = session.trace.repairs
        gaps = [after - before for before, after in pairwise(streamer.times[1:])]
        print(
            f"\ndrain at context {ids.shape[1]}: longest gap {max(gaps):.3f} s, "
            f"median {median(gaps):.3f} s; the change took {repair.stall_seconds:.3f} s of it"
        )
        assert repair.reason == "The server leaves."
        more = smollm2.generate(None, session=session, max_new_tokens=num_more, do_sample=False)
        assert_same_tokens(smollm2_local, expected, torch.cat([first[0], more[0]]))
    swarm.end(victim)
