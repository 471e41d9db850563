"""A tuned model equals prompt tuning by hand on the whole model: losses, gradients, tokens."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from petals.client.tuning.prompts import TuningConfig, add_prompts
from petals.errors import ConfigError, NotSupported
from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair
from support.reference import assert_close
from support.tuned_reference import TunedReference

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])
NUM_PROMPTS = 4
FAMILIES = """
    llama bloom gpt2 opt falcon mpt gptj mixtral gemma gemma3_text qwen3 phi3 deepseek_v3 gpt_oss
    qwen3_next
""".split()
MODES = ("ptune", "deep_ptune")


def tuned_pair(family, mode, kind=HeadKind.CAUSAL_LM):
    """(the reference, the model with remote blocks), with the same prompts; ``mode`` None: none."""
    local, remote = tiny_pair(family, kind)
    if mode is None:
        nothing = torch.zeros(0, remote.get_input_embeddings().embedding_dim)
        return TunedReference(local, local.get_submodule(remote.blocks_path), nothing), remote
    torch.manual_seed(3)
    tuning = TuningConfig(tuning_mode=mode, pre_seq_len=NUM_PROMPTS)
    add_prompts(remote.blocks_host, tuning, len(remote.remote_blocks))
    if mode == "deep_ptune":
        with torch.no_grad():
            remote.intermediate_prompt_embeddings.weight.normal_(std=0.5)
    return TunedReference.of(local, remote), remote


def prompts_of(remote):
    return [p for name, p in remote.named_parameters() if "prompt_embeddings" in name]


def assert_same_gradients(reference, remote):
    for leaf in (*reference.leaves, *prompts_of(remote)):
        leaf.grad = None
    output = remote(IDS, labels=IDS)
    output.loss.backward()
    expected = reference.logits(IDS)
    assert_close(output.logits, expected)
    cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert_close([parameter.grad for parameter in prompts_of(remote)], reference.gradients())


@pytest.fixture(scope="module", params=MODES)
def pair(request):
    return tuned_pair("llama", request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request):
    return tuned_pair(request.param, "deep_ptune")


class TestFamilies:
    def test_loss_and_gradients(self, of_family):
        reference, remote = of_family
        assert remote(IDS).logits.shape[:2] == IDS.shape
        assert_same_gradients(reference, remote)

    def test_padding_changes_no_row(self, of_family):
        reference, remote = of_family
        for mask in (LEFT, LEFT.flip(1)):
            actual = remote(IDS * mask, attention_mask=mask).logits
            for row, real in enumerate(mask.bool()):
                assert_close(actual[row, real], reference.logits(IDS[row : row + 1, real])[0])

    def test_generates_what_the_reference_generates(self, of_family):
        reference, remote = of_family
        for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            options = {"max_new_tokens": 6} | more
            actual = remote.generate(IDS[:1], **options)
            assert torch.equal(actual, reference.generate(IDS[:1], **options))


class TestGeneration:
    def test_a_padded_batch(self, pair):
        reference, remote = pair
        for mask in (LEFT, LEFT.flip(1)):
            actual = remote.generate(IDS * mask, attention_mask=mask, max_new_tokens=5)
            for row, real in enumerate(mask.bool()):
                expected = reference.generate(IDS[row : row + 1, real], max_new_tokens=5)
                assert torch.equal(actual[row, -5:], expected[0, -5:])

    def test_the_session_has_room_for_the_prompts_and_no_more(self, pair):
        _, remote = pair
        remote.remote_blocks.runner.sessions.clear()
        remote.generate(IDS[:1], max_new_tokens=5)
        (session,) = remote.remote_blocks.runner.sessions
        assert session.max_length == NUM_PROMPTS + IDS.shape[1] + 5 - 1
        assert session.lengths == (session.max_length,)
        assert session.steps[0][1] == (NUM_PROMPTS + IDS.shape[1],)

    def test_chunks_prompt_lookup_and_an_assistant(self, pair):
        reference, remote = pair
        loop = IDS[:1, :3].repeat(1, 4)
        expected = reference.generate(loop, max_new_tokens=8)
        for more in (
            *({"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 4}),
            {"assistant_model": reference.model},
        ):
            assert torch.equal(remote.generate(loop, max_new_tokens=8, **more), expected), more

    def test_a_conversation_that_is_set_back(self, pair):
        reference, remote = pair
        first, second = IDS[:1, :5], IDS[:1, 5:]
        with remote.inference_session(max_length=30) as session:
            assert session.max_length == 30 + NUM_PROMPTS
            turn = remote.generate(first, max_new_tokens=4)
            answer = remote.generate(second, max_new_tokens=4)
            assert session.position == NUM_PROMPTS + turn.shape[1] + answer.shape[1] - 1
            session.position = NUM_PROMPTS + turn.shape[1]
            again = remote.generate(None, max_new_tokens=3)
            # Set back into the prompts: the missing ones are added again.
            session.position = NUM_PROMPTS - 2
            anew = remote.generate(first, max_new_tokens=4)
            session.position = 0
            assert torch.equal(remote.generate(first, max_new_tokens=4), anew)
        whole = reference.generate(torch.cat([turn, second], dim=1), max_new_tokens=4)
        assert torch.equal(torch.cat([turn, answer], dim=1), whole)
        assert torch.equal(again, reference.generate(turn, max_new_tokens=3)[:, turn.shape[1] :])
        assert torch.equal(anew, reference.generate(first, max_new_tokens=4))

    def test_steps_with_a_cache(self, pair):
        reference, remote = pair
        expected = reference.logits(IDS).detach()
        with torch.no_grad():
            first = remote(IDS[:, :4], use_cache=True)
            with first.past_key_values as cache:
                assert cache.get_seq_length() == 4
                second = remote(IDS[:, 4:7], past_key_values=cache)
                cache.crop(-2)
                third = remote(IDS[:, 5:], past_key_values=cache)
                cache.reset()
                anew = remote(IDS, past_key_values=cache)
        assert_close(torch.cat([first.logits, second.logits[:, :1], third.logits], 1), expected)
        assert_close(anew.logits, expected)


class TestTraining:
    def test_only_prompts_train(self, pair):
        reference, remote = pair
        trained = [p for p in remote.parameters() if p.requires_grad]
        assert list(map(id, trained)) == list(map(id, prompts_of(remote)))
        assert len(trained) == len(reference.leaves)
        assert all(p.dtype == torch.float32 for p in trained)

    def test_embeddings_instead_of_ids_and_tuples(self, pair):
        _, remote = pair
        embeds = remote.get_input_embeddings()(IDS).requires_grad_()
        loss, logits = remote(inputs_embeds=embeds, labels=IDS, return_dict=False)[:2]
        loss.backward()
        assert embeds.grad.abs().sum() > 0
        assert_close(logits, remote(IDS).logits)

    def test_a_session_gives_no_gradients(self, pair):
        _, remote = pair
        with remote.inference_session(max_length=20), pytest.raises(NotSupported, match="session"):
            remote(IDS)

    def test_gradient_checkpointing_changes_nothing(self, pair):
        reference, remote = pair
        remote.gradient_checkpointing_enable()
        remote.activation_checkpointing_enable()
        assert not remote.is_activation_checkpointing
        assert_same_gradients(reference, remote)
        remote.gradient_checkpointing_disable()


def test_the_text_side_of_a_multimodal_model():
    reference, remote = tuned_pair("gemma3", "deep_ptune")
    assert_same_gradients(reference, remote)
    generated = remote.generate(IDS[:1], max_new_tokens=1)
    assert generated[0, -1] == reference.logits(IDS[:1])[0, -1].argmax()


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "opt", "falcon", "mixtral"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_classifiers(family, mode):
    reference, remote = tuned_pair(family, mode, HeadKind.SEQUENCE_CLASSIFICATION)
    remote.score.requires_grad_()
    labels, mask = torch.tensor([1, 0, 1]), LEFT.flip(1)
    # 0 is the padding token
    output = remote(IDS * mask, attention_mask=mask, labels=labels)
    output.loss.backward()
    rows = [reference.states(IDS[row : row + 1, real]) for row, real in enumerate(mask.bool())]
    head = reference.model.score.weight.requires_grad_()
    logits = torch.cat([states[:, -1] for states in rows]) @ head.T
    cross_entropy(logits, labels).backward()
    assert_close(output.logits, logits)
    trained = [*prompts_of(remote), remote.score.weight]
    expected = [*(reference.gradients() if mode else ()), head.grad]
    assert_close([parameter.grad for parameter in trained], expected)
    assert len([p for p in remote.parameters() if p.grad is not None]) == len(trained)


class TestAsked:
    def test_prompts_begin_as_tokens_and_as_nothing(self):
        _, remote = tiny_pair("gemma3_text")
        plain = remote(IDS).logits
        tuning = TuningConfig(tuning_mode="deep_ptune", pre_seq_len=2)
        add_prompts(remote.blocks_host, tuning, 5)
        deep = remote.intermediate_prompt_embeddings.weight
        assert deep.shape == (2, 5 * 32) and not deep.any()
        vocabulary = remote.get_input_embeddings()(torch.arange(96))
        for prompt in remote.prompt_embeddings.weight:
            assert (prompt == vocabulary).all(1).any()
        assert not torch.equal(remote(IDS).logits, plain)

    def test_old_names(self):
        _, remote = tuned_pair("bloom", "deep_ptune")
        assert remote.transformer.prompt_embeddings is remote.prompt_embeddings
        names = dict(remote.named_parameters())
        assert "transformer.prompt_embeddings.weight" in names
        assert "transformer.intermediate_prompt_embeddings.weight" in names
        _, plain = tiny_pair("bloom")
        assert not hasattr(plain, "prompt_embeddings")
        assert not hasattr(plain.transformer, "prompt_embeddings")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tuning_mode": "lora", "pre_seq_len": 4}, "no tuning_mode 'lora'"),
            ({"tuning_mode": "ptune"}, "no token"),
            ({"tuning_mode": "ptune", "pre_seq_len": -1}, "no token"),
            ({"tuning_mode": "ptune", "pre_seq_len": 1.5}, "no token"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ConfigError, match=message) as refusal:
            TuningConfig(**options)
        assert refusal.value.hint
