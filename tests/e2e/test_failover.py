"""A generation outlives its servers: one is killed in the middle, the tokens stay the same."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm
from petals.types import BlockSpan
from support.streamers import AtToken


def test_kill_in_mid_sentence(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    smollm2_swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = tokenizer("The old lighthouse keeper looked at the sea and", return_tensors="pt")
    ids = prompt["input_ids"]
    expected = smollm2_local.generate(ids, max_new_tokens=24, do_sample=False)
    smollm2_swarm.add_servers(BlockSpan(10, 20))
    with smollm2.inference_session(max_length=ids.shape[1] + 24) as session:
        killed = []

        def kill() -> None:
            killed.append(session.trace.hops[1].peer_id)
            smollm2_swarm.kill(smollm2_swarm.server(killed[0]))

        actual = smollm2.generate(
            ids, session=session, max_new_tokens=24, do_sample=False, streamer=AtToken(9, kill)
        )
        assert_same_tokens(smollm2_local, expected[0], actual[0])
        assert [repair.peer_id for repair in session.trace.repairs] == killed
