"""A model with remote blocks is called in all the ways the local one is."""

import inspect

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin

from petals.client.model.session_cache import SessionCache
from petals.errors import BadInput, NotSupported
from petals.models.checkpoint.arch import describe
from petals.models.loading.head import HeadKind, layer_tuple_size
from petals.models.verify.tiny import SHORT_LENGTH, tiny_config, with_rope_scaling
from support.local_blocks import tiny_pair
from support.reference import assert_close

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])
PADDED_FAMILIES = ("llama", "bloom", "gpt2", "opt", "falcon", "mpt", "gemma3_text", "qwen3_next")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("llama")


@pytest.fixture
def local(pair):
    return pair[0]


@pytest.fixture
def remote(pair):
    pair[1].remote_blocks.runner.sessions.clear()
    return pair[1]


@pytest.mark.parametrize("family", PADDED_FAMILIES)
class TestPadding:
    def test_every_token_is_as_in_the_local_model(self, family):
        local, remote = tiny_pair(family)
        for mask in (LEFT, LEFT.flip(1)):
            expected = local(IDS * mask, attention_mask=mask).logits
            actual = remote(IDS * mask, attention_mask=mask).logits
            assert_close(actual[mask.bool()], expected[mask.bool()])

    def test_generates_the_local_tokens(self, family):
        local, remote = tiny_pair(family)
        for more in ({}, {"num_beams": 2}):
            options = {"attention_mask": LEFT, "max_new_tokens": 5, "use_cache": True} | more
            expected = local.generate(IDS * LEFT, **options)
            assert torch.equal(remote.generate(IDS * LEFT, **options), expected)

    def test_padding_on_the_right_is_no_part_of_the_text(self, family):
        local, remote = tiny_pair(family)
        mask = LEFT.flip(1)
        actual = remote.generate(IDS * mask, attention_mask=mask, max_new_tokens=5)
        assert torch.equal(actual[:, :9], IDS * mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = local.generate(IDS[row : row + 1, :length], max_new_tokens=5, use_cache=True)
            assert torch.equal(actual[row, -5:], alone[0, -5:])


def test_no_padding_travels(remote):
    remote.generate(IDS * LEFT, attention_mask=LEFT, max_new_tokens=2)
    (session,) = remote.remote_blocks.runner.sessions
    assert session.steps == [((0, 0, 0), (5, 8, 9), None), ((5, 8, 9), (1, 1, 1), None)]


def test_padding_is_seen_without_a_mask_too(remote):
    told = remote.generate(IDS * LEFT, attention_mask=LEFT, max_new_tokens=4)
    assert torch.equal(remote.generate(IDS * LEFT, max_new_tokens=4), told)


class TestCalls:
    def test_plain_calls_keep_nothing(self, local, remote):
        output = remote(IDS)
        assert_close(output.logits, local(IDS).logits)
        assert not output.past_key_values.is_open
        assert remote(IDS, use_cache=False).past_key_values is None
        assert not remote.remote_blocks.runner.sessions

    def test_labels(self, local, remote):
        assert_close(remote(IDS, labels=IDS).loss, local(IDS, labels=IDS).loss.detach())

    def test_positional_arguments_and_tuples(self, local, remote):
        ones = torch.ones_like(IDS)
        logits = remote(IDS, ones, return_dict=False)[0]
        assert_close(logits, local(IDS, ones, return_dict=False)[0])

    def test_embeddings(self, local, remote):
        embeddings = local.get_input_embeddings()(IDS).detach()
        assert_close(remote(inputs_embeds=embeddings).logits, local(IDS).logits)

    def test_use_cache_opens_a_session_that_grows(self, local, remote):
        first = remote(IDS[:, :5], use_cache=True)
        cache = first.past_key_values
        assert isinstance(cache, SessionCache)
        second = remote(IDS[:, 5:], past_key_values=cache)
        assert second.past_key_values is cache
        assert_close(second.logits, local(IDS).logits[:, 5:])
        (session,) = remote.remote_blocks.runner.sessions
        assert session.max_length is None
        cache.crop(-3)
        assert_close(remote(IDS[:, 6:], past_key_values=cache).logits, local(IDS).logits[:, 6:])
        cache.close()
        assert session.is_closed

    def test_generate_goes_on_from_such_a_cache(self, local, remote):
        expected = local.generate(IDS[:1], max_new_tokens=4, use_cache=True)
        with remote(IDS[:1, :-1], use_cache=True).past_key_values as cache:
            actual = remote.generate(IDS[:1], past_key_values=cache, max_new_tokens=4)
            assert not remote.remote_blocks.runner.sessions[0].is_closed
        assert torch.equal(actual, expected)

    def test_calls_in_a_session_continue_it(self, local, remote):
        expected = local(IDS).logits
        with remote.inference_session(max_length=9) as session:
            pieces = [remote(IDS[:, :5]).logits, remote(IDS[:, 5:6]).logits]
            assert remote.position == session.position == 6
            session.position = 5
            pieces[1:] = [remote(IDS[:, 5:]).logits]
        assert_close(torch.cat(pieces, dim=1), expected)

    def test_a_session_belongs_to_its_thread(self, remote):
        from concurrent.futures import ThreadPoolExecutor

        with remote.inference_session(max_length=9) as session, ThreadPoolExecutor(1) as other:
            assert remote.active_session is session
            assert other.submit(lambda: remote.active_session).result() is None

    def test_parameters_are_the_ends_and_frozen(self, local, remote):
        names = [name for name, _ in remote.named_parameters()]
        assert names
        assert not any(".layers." in name for name in names)
        assert not any(parameter.requires_grad for parameter in remote.parameters())

    def test_old_names(self, remote):
        assert remote.transformer is remote.model
        assert remote.transformer.h is remote.model.layers is remote.remote_blocks
        assert remote.transformer.word_embeddings is remote.get_input_embeddings()
        assert remote.transformer.ln_f is remote.model.norm
        states = torch.ones(1, 1, 32)
        assert remote.transformer.word_embeddings_layernorm(states) is states
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = remote.no_such_thing


class TestRefusals:
    @pytest.mark.parametrize("name", ["output_router_logits", "output_attentions"])
    def test_what_only_local_blocks_can_show(self, remote, name):
        with pytest.raises(NotSupported, match=name) as refusal:
            remote(IDS, **{name: True})
        assert refusal.value.hint

    def test_the_same_asked_by_the_config(self, remote):
        remote.config.output_router_logits = True
        try:
            with pytest.raises(NotSupported, match="output_router_logits"):
                remote(IDS)
        finally:
            del remote.config.output_router_logits

    def test_hidden_states_of_a_session(self, remote):
        with (
            remote.inference_session(max_length=9),
            pytest.raises(NotSupported, match="output_hidden_states") as refusal,
        ):
            remote(IDS, output_hidden_states=True)
        assert "whole sequences" in refusal.value.hint

    def test_caches_with_tensors(self, local, remote):
        full = local(IDS[:, :3]).past_key_values
        with pytest.raises(NotSupported, match="DynamicCache") as refusal:
            remote(IDS[:, 3:], past_key_values=full)
        assert "use_cache=True" in refusal.value.hint

    def test_masks_and_positions(self, remote):
        with pytest.raises(NotSupported, match="4 dimensions"):
            remote(IDS, attention_mask=torch.ones(3, 1, 9, 9))
        with pytest.raises(NotSupported, match="do not follow"):
            remote(IDS, position_ids=torch.arange(0, 18, 2)[None])

    def test_token_ids(self, remote):
        for ids in (torch.tensor([[96]]), torch.zeros(1, 0, dtype=torch.int64)):
            with pytest.raises(BadInput):
                remote(ids)
        with pytest.raises(BadInput, match="either"):
            remote()

    def test_gradients_of_a_session(self, remote):
        embeddings = torch.zeros(1, 2, 32, requires_grad=True)
        with (
            remote.inference_session(max_length=9),
            pytest.raises(NotSupported, match="Gradients"),
        ):
            remote(inputs_embeds=embeddings)

    def test_another_batch_in_the_same_session(self, remote):
        with remote.inference_session(max_length=9):
            remote(IDS)
            with pytest.raises(BadInput, match="rows"):
                remote(IDS[:1])


@pytest.mark.parametrize("kind", [HeadKind.BASE, HeadKind.SEQUENCE_CLASSIFICATION])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
def test_other_heads(family, kind):
    local, remote = tiny_pair(family, kind)
    for actual, expected in zip(
        remote(IDS, return_dict=True).values(), local(IDS, use_cache=False).values()
    ):
        assert_close(actual, expected.detach())
    assert type(remote).__name__ == f"Distributed{type(local).__name__}"
    assert isinstance(remote, type(local))
    with remote.inference_session(max_length=9) as session:
        remote(IDS)
        assert session.position == 9


@pytest.mark.parametrize(
    ("family", "size"),
    [("bloom", 2), ("gptj", 2), ("bamba", 2), ("llama", 0), ("mixtral", 0), ("jetmoe", 0)],
)
def test_how_layers_answer_is_found_out(family, size):
    config = tiny_config(family)
    assert layer_tuple_size(describe(config), config) == size


def test_the_models_that_compute_their_keys_again_are_known():
    """`generate` of transformers drops the cache of these at a length; the session begins anew."""
    found = {}
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        prepare = getattr(model_class, "prepare_inputs_for_generation", None)
        stock = GenerationMixin.prepare_inputs_for_generation
        if prepare not in (None, stock) and "original_max" in inspect.getsource(prepare):
            found[config_class.model_type] = model_class
    assert {"phi3", "phimoe"} <= found.keys()
    for model_type in found:
        config = with_rope_scaling(tiny_config(model_type), "longrope")
        config = type(config)(**config.to_dict())
        assert config.original_max_position_embeddings == SHORT_LENGTH, model_type
    have_it = {
        config_class.model_type
        for config_class in MODEL_FOR_CAUSAL_LM_MAPPING
        if hasattr(config_class, "original_max_position_embeddings")
    }
    assert have_it <= found.keys(), "a model has the number and keeps its keys"
