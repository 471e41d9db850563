"""Rope factors that depend on the length of a text: always those that stock transformers has.

Longer than `LIMIT` tokens the factors of these models change: for Phi's LongRoPE all keys are
computed again there, for other LongRoPE models and for dynamic NTK earlier keys stay as they are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StoppingCriteria

from petals.server.policies import SchedulerConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.reference import assert_close, token_ids
from support.swarm import RealSwarm, real_swarm

LIMIT = 24
SPANS = (BlockSpan(0, 2), BlockSpan(2, 5))
TURNS = ((9, 6), (4, 12), (3, 20))
"""Tokens of the question and of the answer; the second answer crosses the limit."""

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 1.5, 2.0, 4.0],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without a window: transformers cannot take drafts back from the cache that it makes anew.
    "phi3": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": LIMIT,
            "sliding_window": None,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
            "sliding_window": None,
        },
    ),
    "qwen3 (longrope)": ("qwen3", {"rope_parameters": LONGROPE}),
    "llama (dynamic)": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, overrides = MODELS[request.param]
    return write_tiny_model(tmp_path_factory.mktemp("model"), model_type, **overrides)


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[RealSwarm]:
    """Two servers that cut prompts into pieces of 5 tokens; the client cuts them into 16."""
    pieces = SchedulerConfig(max_batch_tokens=5, min_chunk_tokens=3)
    with real_swarm(
        folder, *SPANS, cache_tokens=4096, max_step_tokens=256, scheduling=pieces
    ) as swarm:
        yield swarm


@pytest.fixture
def remote(swarm: RealSwarm) -> PreTrainedModel:
    return swarm.model(prefill_chunk_tokens=16)


def stock(folder: Path) -> PreTrainedModel:
    """A model that has seen nothing: rotary modules remember the longest text, also of others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture
def local(folder: Path) -> PreTrainedModel:
    return stock(folder)


@pytest.mark.parametrize("length", [20, LIMIT, LIMIT + 1, 60])
def test_a_prompt_in_pieces_equals_one_pass(
    remote: PreTrainedModel, local: PreTrainedModel, length: int
) -> None:
    ids = token_ids(1, length)
    expected = local(ids).logits
    cached = remote(ids, past_key_values=remote.new_cache(), use_cache=True)
    assert_close(cached.logits, expected)
    assert_close(remote(ids, use_cache=False).logits, expected)


def test_a_row_of_a_batch_is_what_it_is_alone(folder: Path, remote: PreTrainedModel) -> None:
    short, long = token_ids(1, 20), token_ids(1, 30, seed=1)
    ids = torch.cat([torch.cat([torch.zeros_like(short[:, :10]), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    logits = remote(ids, attention_mask=mask, use_cache=False).logits
    assert_close(logits[0, 10:], stock(folder)(short).logits[0])
    assert_close(logits[1], stock(folder)(long).logits[0])
    made = remote.generate(ids, attention_mask=mask, max_new_tokens=12)
    for row, alone in zip(made, (short, long)):
        expected = stock(folder).generate(alone, max_new_tokens=12)
        assert torch.equal(row[-expected.shape[1] :], expected[0])


def test_gradients_equal_those_of_one_pass(remote: PreTrainedModel, local: PreTrainedModel) -> None:
    ids = token_ids(1, 30)
    found, expected = (
        model.get_input_embeddings()(ids).detach().requires_grad_() for model in (remote, local)
    )
    for model, embeds in ((remote, found), (local, expected)):
        model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
    assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"prompt_lookup_num_tokens": 4}],
    ids=lambda mode: next(iter(mode), "greedy"),
)
def test_a_text_that_crosses_the_limit(
    remote: PreTrainedModel, local: PreTrainedModel, mode: dict[str, Any]
) -> None:
    ids = token_ids(1, 5).repeat(1, 4)
    texts = []
    for model in (local, remote):
        torch.manual_seed(0)
        texts.append(model.generate(ids, max_new_tokens=25, **mode))
    assert torch.equal(texts[1], texts[0])
    with remote.inference_session(max_length=50):
        torch.manual_seed(0)
        assert torch.equal(remote.generate(ids, max_new_tokens=25, **mode), texts[0])


def conversation(
    model: PreTrainedModel, before_answer: Callable[[int], None] = lambda turn: None
) -> torch.Tensor:
    """The answers of `TURNS` in one session; ``before_answer`` is called in the middle of each."""
    answers = []
    with model.inference_session(max_length=60):
        for turn, (asked, answered) in enumerate(TURNS):
            first = model.generate(token_ids(1, asked, seed=turn), max_new_tokens=answered // 2)
            before_answer(turn)
            rest = model.generate(None, max_new_tokens=answered - answered // 2)
            answers += [first, rest]
    return torch.cat(answers, dim=1)


def stock_conversation(folder: Path) -> torch.Tensor:
    """The same with the cache of transformers, which goes from call to call."""
    model = stock(folder)
    ids, cache = torch.empty(1, 0, dtype=torch.int64), None
    for turn, (asked, answered) in enumerate(TURNS):
        ids = torch.cat([ids, token_ids(1, asked, seed=turn)], dim=1)
        for count in (answered // 2, answered - answered // 2):
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                past_key_values=cache,
                return_dict_in_generate=True,
            )
            ids, cache = made.sequences, made.past_key_values
    return ids


def test_a_conversation_that_crosses_the_limit(folder: Path, remote: PreTrainedModel) -> None:
    assert torch.equal(conversation(remote), stock_conversation(folder))


@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_the_words_stay_when_a_server_goes(folder: Path, kind: str, victim: int, when: int) -> None:
    """Before, after the limit and right at it; killed: replays in parts, stopped: a migration."""
    with real_swarm(folder, *SPANS, *SPANS, cache_tokens=1024, max_step_tokens=16) as swarm:
        remote = swarm.model()

        def lose(turn: int) -> None:
            if turn == when:
                hops = remote.active_session.trace.hops
                getattr(swarm, kind)(hops[victim].peer_id)

        assert torch.equal(conversation(remote, lose), stock_conversation(folder))


def test_the_words_stay_after_a_rollback(folder: Path, remote: PreTrainedModel) -> None:
    """Back to before the limit, and back over a part only."""
    ids = token_ids(1, 20)
    whole = stock(folder).generate(ids, max_new_tokens=20)
    for position in (15, 30):
        with remote.inference_session(max_length=60) as session:
            remote.generate(ids, max_new_tokens=20)
            session.position = position
            kept = session.output_ids
            again = remote.generate(whole[:, kept.shape[1] : 35], max_new_tokens=5)
            assert torch.equal(torch.cat([kept, again], dim=1), whole)


def test_tokens_that_are_taken_back(remote: PreTrainedModel, local: PreTrainedModel) -> None:
    """A loop by hand: dynamic scaling keeps the factors of the longest text that has been run."""
    ids = token_ids(1, 40)
    kept = []
    for model, cache in ((remote, remote.new_cache()), (local, DynamicCache())):
        logits = []
        for length, num_back in ((40, 10), (31, 1), (33, 23), (20, 0)):
            done = cache.get_seq_length()
            positions = torch.arange(done, length)[None]
            output = model(
                ids[:, done:length], position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits.append(output.logits)
            cache.crop(-num_back)
        kept.append(torch.cat(logits, dim=1))
    assert_close(kept[0], kept[1])


def test_a_cache_that_was_put_aside_keeps_its_factors(
    folder: Path, remote: PreTrainedModel
) -> None:
    """`generate` frees the session of the cache that it returns; going on runs its tokens again."""
    ids, made = token_ids(1, 20), []
    for model in (remote, stock(folder)):
        asked = {"max_new_tokens": 12, "return_dict_in_generate": True, "use_cache": True}
        first = model.generate(ids, **asked)
        more = torch.cat([first.sequences, ids[:, :3]], dim=1)
        cache = first.past_key_values
        scores = {"output_logits": True, "past_key_values": cache}
        made.append(torch.cat(model.generate(more, **asked, **scores).logits))
    assert_close(*made)


def test_a_call_that_fails_past_the_limit_leaves_the_factors_before_it(
    folder: Path, remote: PreTrainedModel
) -> None:
    class Fails(StoppingCriteria):
        def __call__(
            self, input_ids: torch.Tensor, scores: object, **kwargs: object
        ) -> torch.Tensor:
            if input_ids.shape[1] > LIMIT + 4:
                raise RuntimeError("The criterion is broken.")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ids, reply = token_ids(1, 12), token_ids(1, 2, seed=3)
    with remote.inference_session(max_length=60):
        told = remote.generate(ids, max_new_tokens=4)
        with pytest.raises(RuntimeError, match="broken"):
            remote.generate(reply, max_new_tokens=20, stopping_criteria=[Fails()])
        answer = remote.generate(reply, max_new_tokens=4)
    whole = stock(folder).generate(torch.cat([told, reply], dim=1), max_new_tokens=4)
    assert torch.equal(torch.cat([told, answer], dim=1), whole)
