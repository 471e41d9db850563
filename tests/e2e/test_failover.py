"""A sentence outlives its servers: one is killed in the middle, the words stay the same."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalServer, LocalSwarm
from petals.types import BlockSpan


class KillAfter:
    """A streamer that kills the server of the session's second hop at its ``count``-th call."""

    def __init__(self, swarm: LocalSwarm, session: object, count: int) -> None:
        self._swarm, self._session, self._left = swarm, session, count
        self.victim: LocalServer | None = None

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            peer_id = self._session.trace.hops[1].peer_id
            self.victim = next(s for s in self._swarm.servers if s.peer_id == peer_id)
            self._swarm.kill(self.victim)

    def end(self) -> None:
        assert self.victim is not None


def test_kill_in_mid_sentence(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    smollm2_swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = tokenizer("The old lighthouse keeper looked at the sea and", return_tensors="pt")
    ids = prompt["input_ids"]
    expected = smollm2_local.generate(ids, max_new_tokens=24, do_sample=False)
    smollm2_swarm.add_server(BlockSpan(10, 20))
    with smollm2.inference_session(max_length=ids.shape[1] + 24) as session:
        killer = KillAfter(smollm2_swarm, session, count=9)
        actual = smollm2.generate(
            ids, session=session, max_new_tokens=24, do_sample=False, streamer=killer
        )
        assert_same_tokens(smollm2_local, expected[0], actual[0])
        (repair,) = session.trace.repairs
        assert killer.victim is not None and repair.peer_id == killer.victim.peer_id
    smollm2_swarm.servers.remove(killer.victim)
