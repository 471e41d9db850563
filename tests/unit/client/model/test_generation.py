"""`generate` through remote blocks gives the local tokens, in every mode of transformers."""

import copy
import sys

import pytest
import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.generation.streamers import BaseStreamer

from petals.errors import BadInput, LengthExceeded, MissingBlocksError, NotSupported
from support.local_blocks import tiny_pair

FAMILIES = (
    "llama",
    "bloom",
    "gpt2",
    "opt",
    "gemma3_text",
    "mixtral",
    "falcon",
    "mpt",
    "gptj",
    "gpt_oss",
    "deepseek_v3",
    "qwen3",
)
PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])


@pytest.fixture(scope="module")
def llama():
    return tiny_pair("llama")


@pytest.fixture
def models(llama):
    local, remote = llama
    remote.remote_blocks.runner.sessions.clear()
    return local, remote


def sessions(remote):
    return remote.remote_blocks.runner.sessions


def same(local, remote, *inputs, **options):
    """Both generate with the same seed; the swarm's tokens are the local ones and are returned."""
    torch.manual_seed(7)
    expected = local.generate(*inputs, use_cache=True, **options)
    torch.manual_seed(7)
    actual = remote.generate(*inputs, **options)
    assert torch.equal(actual, expected)
    assert all(session.is_closed for session in sessions(remote))
    return actual


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_local_tokens(family):
    local, remote = tiny_pair(family)
    same(local, remote, PROMPT, max_new_tokens=10)
    same(local, remote, PROMPT, max_new_tokens=10, do_sample=True, top_k=20)
    same(local, remote, PROMPT, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    same(local, remote, PROMPT, max_new_tokens=10, prompt_lookup_num_tokens=4)
    same(local, remote, PROMPT, max_new_tokens=10, assistant_model=local)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_recurrent_hybrids(family):
    local, remote = tiny_pair(family)
    same(local, remote, PROMPT, max_new_tokens=8)
    same(local, remote, PROMPT, max_new_tokens=8, num_beams=2)


def test_the_text_side_of_a_multimodal_model():
    local, remote = tiny_pair("gemma3")
    same(local, remote, PROMPT, max_new_tokens=8)


FILES_OF_A_TOKEN = {
    "connection/event_loop.py",
    "model/distributed.py",
    "model/generation_call.py",
    "model/inference_session.py",
    "model/padding.py",
    "model/remote_sequential.py",
    "model/session_cache.py",
}


class Watch(StoppingCriteria):
    """Files of the client that run in this thread between the second and the third token."""

    def __init__(self):
        self.num_tokens, self.files = 0, set()

    def __call__(self, input_ids, scores, **kwargs):
        self.num_tokens += 1
        sys.setprofile(self.note if self.num_tokens == 2 else None)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def note(self, frame, event, arg):
        _, found, path = frame.f_code.co_filename.partition("/petals/client/")
        if found and path.startswith(("model/", "connection/")):
            self.files.add(path)


def test_a_token_takes_a_short_way_through_the_client(models):
    _, remote = models
    watch = Watch()
    remote.generate(PROMPT, max_new_tokens=4, stopping_criteria=[watch])
    assert watch.files == FILES_OF_A_TOKEN


class TestSessionOfOneCall:
    def test_has_exactly_the_length_it_needs(self, models):
        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=5)
        (session,) = sessions(remote)
        assert session.max_length == PROMPT.shape[1] + 5 - 1  # the last token is never run
        assert session.lengths == (session.max_length,)

    def test_max_length_counts_the_prompt(self, models):
        local, remote = models
        assert same(local, remote, PROMPT, max_length=12).shape == (1, 12)
        assert sessions(remote)[0].max_length == 11

    def test_each_token_is_one_step(self, models):
        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=5)
        assert [counts for _, counts, _ in sessions(remote)[0].steps] == [(7,), *[(1,)] * 4]

    def test_is_closed_when_a_stopping_criterion_raises(self, models):
        class Broken(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                raise RuntimeError("broken")

        _, remote = models
        with pytest.raises(RuntimeError, match="broken"):
            remote.generate(PROMPT, max_new_tokens=5, stopping_criteria=[Broken()])
        assert [session.is_closed for session in sessions(remote)] == [True]

    def test_a_lost_block_tells_what_was_generated(self, models):
        local, remote = models
        ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
        mask = (ids != 0).long()
        whole = remote.generate(ids, attention_mask=mask, max_new_tokens=6)
        remote.remote_blocks.runner.errors[3] = MissingBlocksError("Blocks 2:4 are not served.")
        with pytest.raises(MissingBlocksError) as caught:
            remote.generate(ids, attention_mask=mask, max_new_tokens=6)
        assert torch.equal(caught.value.generated, whole[:, :6])

    def test_prompt_lookup_saves_trips_and_needs_no_longer_session(self, models):
        local, remote = models
        loop = PROMPT[:, :3].repeat(1, 4)
        same(local, remote, loop, max_new_tokens=10, prompt_lookup_num_tokens=8)
        (session,) = sessions(remote)
        assert session.max_length == loop.shape[1] + 9
        assert max(counts[0] for _, counts, _ in session.steps[1:]) > 1
        assert any(start < sum(c[0] for _, c, _ in session.steps[:i]) for i, ((start,), _, _) in
                   enumerate(session.steps))  # fmt: skip

    def test_rollback_rides_on_the_next_step(self, models):
        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=10, prompt_lookup_num_tokens=4)
        assert all(sum(counts) > 0 for _, counts, _ in sessions(remote)[0].steps)

    def test_beams_fork_on_the_next_step(self, models):
        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=6, num_beams=3)
        steps = sessions(remote)[0].steps
        assert len(steps) == 6
        assert any(reorder is not None for _, _, reorder in steps)

    def test_without_a_cache_every_step_is_the_whole_sequence(self, models):
        local, remote = models
        before = remote.remote_blocks.runner.num_whole
        expected = local.generate(PROMPT, max_new_tokens=3)
        assert torch.equal(remote.generate(PROMPT, max_new_tokens=3, use_cache=False), expected)
        assert not sessions(remote)
        assert remote.remote_blocks.runner.num_whole == before + 3


class TestOptions:
    def test_streamer_sees_prompt_and_tokens(self, models):
        class Collect(BaseStreamer):
            def __init__(self):
                self.ids, self.ended = [], False

            def put(self, value):
                self.ids += value.flatten().tolist()

            def end(self):
                self.ended = True

        _, remote = models
        streamer = Collect()
        ids = remote.generate(PROMPT, max_new_tokens=5, streamer=streamer)
        assert streamer.ids == ids[0].tolist()
        assert streamer.ended

    def test_numbers_for_do_sample(self, models):
        _, remote = models
        expected = remote.generate(PROMPT, max_new_tokens=5)
        assert torch.equal(remote.generate(PROMPT, max_new_tokens=5, do_sample=0), expected)
        torch.manual_seed(0)
        first = remote.generate(PROMPT, max_new_tokens=5, do_sample=1, temperature=5.0)
        assert not torch.equal(first, expected)

    def test_input_ids_by_name(self, models):
        _, remote = models
        by_name = remote.generate(input_ids=PROMPT, max_new_tokens=5)
        assert torch.equal(by_name, remote.generate(PROMPT, max_new_tokens=5))

    def test_penalties_stopping_and_several_answers(self, models):
        class AfterTen(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                done = input_ids.shape[1] >= 10
                return torch.full((input_ids.shape[0],), done, dtype=torch.bool)

        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=8, repetition_penalty=1.5)
        stop = StoppingCriteriaList([AfterTen()])
        assert same(local, remote, PROMPT, max_new_tokens=9, stopping_criteria=stop).shape[1] == 10
        many = {"do_sample": True, "num_return_sequences": 3}
        assert same(local, remote, PROMPT, max_new_tokens=6, **many).shape[0] == 3

    def test_an_end_token_ends_one_row_before_the_other(self, models):
        local, remote = models
        both = torch.cat([PROMPT, PROMPT.flip(1)])
        second = local.generate(both, max_new_tokens=3, use_cache=True)[0, 8].item()
        end = {"eos_token_id": second, "pad_token_id": 0}
        same(local, remote, both, max_new_tokens=8, **end)

    def test_model_output(self, models):
        local, remote = models
        asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 4}
        expected = local.generate(PROMPT, use_cache=True, **asked)
        actual = remote.generate(PROMPT, **asked)
        assert torch.equal(actual.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores))

    def test_from_the_bos_token(self, models):
        local, remote = models
        torch.manual_seed(0)
        same(local, remote, max_new_tokens=5)

    def test_from_embeddings(self, models):
        local, remote = models
        embeddings = local.get_input_embeddings()(PROMPT).detach()
        same(local, remote, inputs_embeds=embeddings, max_new_tokens=5)

    @pytest.mark.parametrize("side", ["left", "right", "inside"])
    @pytest.mark.parametrize("given", ["ids", "embeds", "both", "empty ids", "other ids"])
    @pytest.mark.parametrize("extra", ["mask", "mask and positions", "no mask"])
    def test_padding_moves_all_that_belongs_to_a_column(self, models, side, given, extra):
        """Each row generates what it generates alone, wherever its padding is."""
        local, remote = models
        rows = [torch.tensor([31, 7, 54, 23, 90, 8]), torch.tensor([11, 54, 7])]
        order = {
            "left": [3, 4, 5, 0, 1, 2],
            "right": [0, 1, 2, 3, 4, 5],
            "inside": [0, 3, 1, 4, 5, 2],
        }
        ids = torch.zeros(2, 6, dtype=torch.int64)
        ids[0] = rows[0]
        mask = torch.ones_like(ids)
        padded = torch.zeros(6, dtype=torch.int64)
        padded[:3] = rows[1]
        ids[1] = padded[torch.tensor(order[side])]
        mask[1] = (ids[1] != 0).long()
        embeddings = local.get_input_embeddings()(ids).detach()
        call = {"max_new_tokens": 5}
        if given != "embeds":
            other = {"empty ids": ids[:, :0], "other ids": ids[:, :2] + 5}
            call["input_ids"] = other.get(given, ids)
        if given != "ids":
            call["inputs_embeds"] = embeddings
        if extra != "no mask":
            call["attention_mask"] = mask
        elif given in ("embeds", "empty ids", "other ids"):
            return  # padding is unknown; transformers takes all columns as tokens
        if extra == "mask and positions":
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        before = {name: copy.deepcopy(value) for name, value in call.items()}
        answer = remote.generate(**call)
        assert all(torch.equal(call[name], before[name]) for name in call if name[0] in "ia")
        if "input_ids" in call:
            prompt = call["input_ids"]
            assert torch.equal(answer[:, : prompt.shape[1]], prompt)
            answer = answer[:, prompt.shape[1] :]
        for row, new in zip(rows, answer):
            alone = local.generate(row[None], max_new_tokens=5, use_cache=True)
            assert torch.equal(new, alone[0, -5:])

    def test_a_pad_id_inside_the_ids_without_a_mask(self, models):
        local, remote = models
        ids = torch.tensor([[11, 54, 7, 0, 33, 54, 23, 90, 8]])
        same(local, remote, ids, max_new_tokens=5)
        embeddings = local.get_input_embeddings()(ids).detach()
        same(local, remote, ids, inputs_embeds=embeddings, max_new_tokens=5)

    def test_a_prompt_in_chunks(self, models):
        local, remote = models
        same(local, remote, PROMPT, max_new_tokens=5, prefill_chunk_size=3)
        assert sessions(remote)[0].steps[0] == ((0,), (3,), None)

    def test_a_remote_model_drafts_for_a_local_one(self, models):
        local, remote = models
        expected = local.generate(PROMPT, max_new_tokens=10, use_cache=True)
        options = {"max_new_tokens": 10, "assistant_model": remote, "use_cache": True}
        assert torch.equal(local.generate(PROMPT, **options), expected)
        assert len(sessions(remote)) == 1  # one session for all its rounds
        assert any(start for (start,), _, _ in sessions(remote)[0].steps)


class TestRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            {"penalty_alpha": 0.6, "top_k": 4},
            {"num_beam_groups": 2, "num_beams": 4},
            {"force_words_ids": [[5]], "num_beams": 2},
            {"dola_layers": "low"},
            {"custom_generate": "someone/code"},
            {"cache_implementation": "static"},
            {"output_hidden_states": True, "return_dict_in_generate": True},
            {"output_attentions": True, "return_dict_in_generate": True},
            {"cache_implementation": "paged"},
            {"generation_config": GenerationConfig(cache_implementation="offloaded")},
            {"assistant_early_exit": 2},
            {"use_mtp": True},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_what_cannot_work_says_so_before_anything_is_sent(self, models, options):
        _, remote = models
        config = remote.config.to_dict()
        with pytest.raises(NotSupported) as refusal:
            remote.generate(PROMPT, max_new_tokens=4, **options)
        assert refusal.value.hint
        assert refusal.value.generated is None
        assert not sessions(remote)
        assert remote.config.to_dict() == config

    @pytest.mark.parametrize(
        "options",
        [
            {"cache_implementation": "dynamic"},
            {"output_attentions": True},
            {"output_hidden_states": True},
            {"use_mtp": False},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_what_asks_for_nothing_is_accepted(self, models, options):
        same(*models, PROMPT, max_new_tokens=4, **options)

    @pytest.mark.parametrize(
        "name", [name for name in vars(ContinuousMixin) if not name.startswith(("_", "destroy"))]
    )
    def test_continuous_batching(self, models, name):
        _, remote = models
        with pytest.raises(NotSupported, match="Continuous batching") as refusal:
            getattr(remote, name)([[10, 20], [30]], max_new_tokens=4)
        assert "padded batch" in refusal.value.hint

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (torch.zeros(1, 0, dtype=torch.int64), "empty"),
            (torch.tensor([[5, 96]]), "96 is outside the vocabulary"),
            (torch.tensor([[-1, 5]]), "-1 is outside the vocabulary"),
            (torch.tensor([5, 6]), "shape"),
            (torch.tensor([[0.5]]), "integers"),
        ],
        ids=["empty", "too-high", "negative", "one-dimension", "float"],
    )
    def test_wrong_prompts(self, models, prompt, message):
        _, remote = models
        with pytest.raises(BadInput, match=message) as refusal:
            remote.generate(prompt, max_new_tokens=4)
        assert refusal.value.hint
        assert not sessions(remote)

    def test_an_empty_row(self, models):
        _, remote = models
        mask = torch.tensor([[0, 0], [1, 1]])
        with pytest.raises(BadInput, match="empty"):
            remote.generate(PROMPT[:, :2].repeat(2, 1), attention_mask=mask, max_new_tokens=4)

    def test_nothing_to_start_from(self, models):
        _, remote = models
        remote.generation_config.bos_token_id, bos = None, remote.generation_config.bos_token_id
        try:
            with pytest.raises(BadInput, match="nothing to start from"):
                remote.generate(max_new_tokens=4)
        finally:
            remote.generation_config.bos_token_id = bos

    def test_drafting_for_a_batch(self, models):
        local, remote = models
        both = PROMPT.repeat(2, 1)
        for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": local}):
            with pytest.raises(NotSupported, match="one sequence"):
                remote.generate(both, max_new_tokens=4, **draft)

    def test_ids_that_do_not_continue_a_cache(self, models):
        local, remote = models
        cache = remote.new_cache()
        cache.open(max_length=20)
        text = remote.generate(PROMPT, past_key_values=cache, max_new_tokens=3)
        for ids, mask in (
            (text[:, -1:], None),  # the last token alone, without a mask
            (text[:, :-1], None),  # as long as the cache
            (text, torch.ones(1, 5)),
            (text[:, -1:], torch.ones(1, 4)),
        ):
            with pytest.raises(BadInput, match="do not continue past_key_values of 9") as refusal:
                remote.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
            assert "those 9 and the new ones" in refusal.value.hint
        expected = local.generate(PROMPT, max_new_tokens=5, use_cache=True)
        for ids, mask in ((text, None), (text[:, -1:], torch.ones(1, 10))):
            given = {"attention_mask": mask, "past_key_values": cache}
            rest = remote.generate(ids, max_new_tokens=1, **given)
            cache.crop(-1)
            assert torch.equal(rest[:, -1:], expected[:, 10:11])

    def test_longer_than_the_session(self, models):
        _, remote = models
        with remote.inference_session(max_length=9), pytest.raises(LengthExceeded):
            remote.generate(PROMPT, max_new_tokens=9)
        assert [session.is_closed for session in sessions(remote)] == [True]
