"""The cache idioms of transformers' documentation, as written, on a model with remote blocks."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from petals.client.model.session_cache import SessionCache
from petals.errors import NotSupported, SessionClosed
from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair
from support.reference import assert_close

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
MORE = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(2))
FAMILIES = ("llama", "bloom", "gemma3_text", "qwen3_next")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("llama")


@pytest.fixture
def local(pair):
    return pair[0]


@pytest.fixture
def remote(pair):
    remote = pair[1]
    remote.remote_blocks.runner.sessions.clear()
    yield remote
    remote.requires_grad_(False)
    remote.config.use_cache = True


@pytest.fixture
def sessions(remote):
    """Sessions that were opened, in their order."""
    return remote.remote_blocks.runner.sessions


def num_open(sessions):
    return sum(session.is_open for session in sessions)


def greedy(model, ids, num_tokens, **first):
    """A loop as people write it: the returned cache goes into the next call."""
    tokens, out = [], model(ids, **first)
    for _ in range(num_tokens):
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = model(tokens[-1], past_key_values=out.past_key_values)
    return torch.cat(tokens, dim=1)


def chat(model, cache, **first_turn):
    """Two turns of `generate` on one cache, each with all ids so far."""
    ids = IDS
    for options in (first_turn, {}):
        options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache} | options
        ids = torch.cat([model.generate(ids, **options), MORE], dim=1)
    return ids


class TestLoop:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("first", [{}, {"use_cache": True}, {"use_cache": None}])
    def test_goes_on_from_what_a_call_returned(self, family, first):
        local, remote = tiny_pair(family)
        assert torch.equal(greedy(remote, IDS, 6, **first), greedy(local, IDS, 6, **first))

    @pytest.mark.parametrize("kind", [HeadKind.CAUSAL_LM, HeadKind.BASE])
    def test_of_a_batch_with_padding_and_tuples(self, kind):
        local, remote = tiny_pair("llama", kind)
        ids = torch.cat([IDS, IDS.flip(1)])
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected = actual = None
        for model in (local, remote):
            first = model(ids[:, :6], attention_mask=mask[:, :6], return_dict=False)
            second = model(ids[:, 6:], attention_mask=mask, past_key_values=first[1])
            expected, actual = actual, second[0]
        assert_close(actual, expected.detach())

    def test_follows_the_config(self, local, remote):
        for use_cache, asked in ((False, None), (True, False)):
            remote.config.use_cache = use_cache
            assert remote(IDS, use_cache=asked).past_key_values is None
        remote.config.use_cache = True
        assert isinstance(remote(IDS).past_key_values, SessionCache)

    def test_outputs_that_are_dropped_or_kept_open_no_session(self, remote, sessions):
        kept = [remote(IDS) for _ in range(50)]
        assert all(out.past_key_values.get_seq_length() == IDS.shape[1] for out in kept)
        assert not sessions

    def test_a_session_is_opened_when_the_cache_is_continued_and_freed_with_it(
        self, local, remote, sessions
    ):
        out = remote(IDS)
        again = remote(MORE, past_key_values=out.past_key_values)
        assert again.past_key_values is out.past_key_values
        assert [session.lengths for session in sessions] == [(13,)]
        assert [counts for _, counts, _ in sessions[0].steps] == [(9,), (4,)]
        assert_close(again.logits, local(torch.cat([IDS, MORE], 1)).logits[:, -4:].detach())

    def test_changes_before_the_session(self, local, remote):
        ids = torch.cat([IDS, IDS.flip(1)])
        logits = []
        for model in (local, remote):
            cache = model(ids).past_key_values
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([0]))
            cache.batch_repeat_interleave(2)
            logits.append(model(MORE.expand(2, -1), past_key_values=cache).logits)
        assert_close(logits[1], logits[0].detach())

    def test_a_call_that_learns_has_its_gradients_and_a_cache(self, local, remote, sessions):
        remote.get_input_embeddings().requires_grad_(True)
        remote(IDS, labels=IDS, use_cache=True).loss.backward()
        local(IDS, labels=IDS).loss.backward()
        found = remote.get_input_embeddings().weight.grad
        assert_close(found, local.get_input_embeddings().weight.grad)
        out = remote(IDS, output_hidden_states=True, use_cache=True)
        assert len(out.hidden_states) == remote.config.num_hidden_layers + 1
        assert not sessions
        with torch.no_grad():
            again = remote(MORE, past_key_values=out.past_key_values)
        assert_close(again.logits, local(torch.cat([IDS, MORE], 1)).logits[:, -4:].detach())

    def test_hidden_states_asked_for_are_the_only_ones(self, remote):
        states = remote(IDS, output_hidden_states=2).hidden_states
        assert [state is not None for state in states].count(True) == 1

    def test_a_tuned_model(self):
        from petals.client.tuning.prompts import TuningConfig, add_prompts

        _, remote = tiny_pair("llama")
        tuning = TuningConfig(tuning_mode="deep_ptune", pre_seq_len=3)
        add_prompts(remote.blocks_host, tuning, remote.config.num_hidden_layers)
        whole = remote(torch.cat([IDS, MORE], 1)).logits
        cache = remote(IDS).past_key_values
        assert cache.get_seq_length() == IDS.shape[1]
        with torch.no_grad():
            assert_close(remote(MORE, past_key_values=cache).logits, whole[:, -4:].detach())


class TestCachesOfTransformers:
    def makers(self, model):
        yield DynamicCache
        yield lambda: DynamicCache(config=model.config)
        yield lambda: DynamicCache(config=model.config, offloading=False)
        yield lambda: StaticCache(config=model.config, max_cache_len=100)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_empty_one_becomes_ours_and_goes_on(self, family):
        local, remote = tiny_pair(family)
        expected = chat(local, DynamicCache(config=local.config))
        for make in self.makers(remote):
            assert torch.equal(chat(remote, make()), expected)

    def test_a_loop_with_a_mask_and_cache_positions(self, local, remote):
        found = []
        for model in (local, remote):
            cache, ids, mask = DynamicCache(config=model.config), IDS, torch.ones_like(IDS)
            position, tokens = torch.arange(IDS.shape[1]), []
            for _ in range(5):
                inputs = {"input_ids": ids, "attention_mask": mask, "cache_position": position}
                out = model(**inputs, past_key_values=cache, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)
                tokens.append(ids)
                mask = torch.cat([mask, mask.new_ones((1, 1))], dim=-1)
                position = position[-1:] + 1
            assert cache.get_seq_length() == IDS.shape[1] + 4
            found.append(torch.cat(tokens, 1))
        assert torch.equal(*found)

    def test_other_classes_are_refused(self, remote):
        class Own(DynamicCache):
            pass

        with pytest.raises(NotSupported, match="Own") as refusal:
            remote(IDS, past_key_values=Own())
        assert "DynamicCache()" in refusal.value.hint

    def test_early_initialization_holds_nothing(self, local, remote):
        cache = StaticCache(config=remote.config, max_cache_len=32)
        config = remote.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        cache.early_initialization(1, heads, width, torch.float32, torch.device("cpu"))
        assert_close(remote(IDS, past_key_values=cache).logits, local(IDS).logits.detach())


class TestTurns:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_cache_of_ours_grows_from_turn_to_turn(self, family):
        local, remote = tiny_pair(family)
        expected = chat(local, DynamicCache(config=local.config))
        assert torch.equal(chat(remote, remote.new_cache()), expected)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
    def test_the_cache_that_generate_returns_goes_on(self, local, remote, sessions, options):
        turns = []
        for model in (local, remote):
            asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
            first = model.generate(IDS, **asked, **options)
            cache = first.past_key_values
            if options.get("num_beams"):
                cache.batch_select_indices(torch.tensor([0]))
                cache.crop(IDS.shape[1] - cache.get_seq_length())
            for _ in range(2):
                ids = torch.cat([first.sequences, MORE], dim=1)
                first = model.generate(ids, past_key_values=cache, **asked)
            turns.append(first.sequences)
        assert torch.equal(*turns)

    def test_returned_caches_hold_no_memory_on_servers(self, remote, sessions):
        options = {"max_new_tokens": 3, "return_dict_in_generate": True}
        kept = [remote.generate(IDS, **options) for _ in range(4)]
        assert len(sessions) == 4
        assert num_open(sessions) == 0
        lengths = [out.past_key_values.get_seq_length() for out in kept]
        assert lengths == [IDS.shape[1] + 2] * 4

    def test_an_error_leaves_no_session(self, remote, sessions):
        def fail(*args):
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            remote.generate(IDS, max_new_tokens=3, logits_processor=[fail])
        assert num_open(sessions) == 0


class TestCopies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prefix_is_copied_for_every_question(self, family):
        local, remote = tiny_pair(family)
        answers = []
        for model in (local, remote):
            with torch.no_grad():
                cache = StaticCache(config=model.config, max_cache_len=64)
                prefix = model(IDS, past_key_values=cache).past_key_values
            for question in (MORE, MORE.flip(1)):
                own, ids = copy.deepcopy(prefix), torch.cat([IDS, question], dim=1)
                asked = {"max_new_tokens": 5, "do_sample": False}
                answers.append(model.generate(ids, past_key_values=own, **asked))
            assert prefix.get_seq_length() == IDS.shape[1]
        assert torch.equal(torch.cat(answers[:2]), torch.cat(answers[2:]))
        forks = remote.remote_blocks.runner.sessions[1:]
        assert all(fork.steps[0][0] == (IDS.shape[1],) for fork in forks), "the prefix ran again"

    def test_of_outputs_and_of_caches_without_a_session(self, local, remote, sessions):
        with torch.no_grad():
            for out in (remote(IDS), remote(IDS, use_cache=True)):
                twin = copy.deepcopy(out)
                mine, other = (
                    remote(MORE, past_key_values=one.past_key_values).logits for one in (out, twin)
                )
                assert torch.equal(mine, other)
                assert_close(mine, local(torch.cat([IDS, MORE], 1)).logits[:, -4:])
        assert len(sessions) == 4

    def test_of_a_session(self, local, remote):
        with remote.inference_session(max_length=40) as session:
            told = remote.generate(IDS, max_new_tokens=4)
            with copy.deepcopy(session) as fork:
                assert fork.position == session.position
                there = remote.generate(MORE, max_new_tokens=4, session=fork)
                here = remote.generate(MORE.flip(1), max_new_tokens=4, session=session)
        for more, found in ((MORE, there), (MORE.flip(1), here)):
            whole = local.generate(torch.cat([told, more], 1), max_new_tokens=4, use_cache=True)
            assert torch.equal(torch.cat([told, found], 1), whole)

    def test_a_fork_can_be_longer(self, remote):
        with remote.inference_session(max_length=12) as session:
            remote(IDS)
            with session.fork(max_length=30) as fork, remote.use_session(fork):
                remote(MORE)
                assert (fork.max_length, fork.position) == (30, 13)
        with pytest.raises(SessionClosed):
            session.step(torch.zeros(1, 1, 32))


class TestPickles:
    @pytest.mark.parametrize("asked", [{}, {"use_cache": True}])
    def test_a_cache_goes_on_in_another_process(self, local, remote, asked):
        with torch.no_grad():
            out = remote(IDS, **asked)
            file = io.BytesIO()
            torch.save(out, file)
            file.seek(0)
            for loaded in (
                pickle.loads(pickle.dumps(out)),
                torch.load(file, weights_only=False),
            ):
                again = remote(MORE, past_key_values=loaded.past_key_values).logits
                assert_close(again, local(torch.cat([IDS, MORE], 1)).logits[:, -4:])

    def test_a_closed_cache_stays_closed(self, remote):
        with torch.no_grad(), remote(IDS, use_cache=True).past_key_values as cache:
            pass
        loaded = pickle.loads(pickle.dumps(cache))
        for closed in (loaded, copy.deepcopy(cache)):
            with pytest.raises(SessionClosed):
                remote(MORE, past_key_values=closed)

    def test_a_session_says_what_to_pickle(self, remote):
        with remote.inference_session(max_length=9) as session:
            with pytest.raises(NotSupported, match="pickled") as refusal:
                pickle.dumps(session)
            assert "output_ids" in refusal.value.hint
