"""Hidden states of every block, in the shape that transformers gives them."""

import pytest
import torch

from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
FAMILIES = ("bloom", "deepseek_v3", "falcon", "gemma3_text", "gpt2", "gptj", "llama", "mpt", "opt")


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for entry, (one, other) in enumerate(zip(actual, expected)):
        assert (one is None) == (other is None), entry
        if one is not None:
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_local_model_gives_them(family):
    local, remote = tiny_pair(family)
    with torch.no_grad():
        expected = local(IDS, output_hidden_states=True)
        actual = remote(IDS, output_hidden_states=True)
        assert_same(actual.hidden_states, expected.hidden_states)
        assert remote(IDS).hidden_states is None
        base = remote.base_model(IDS, output_hidden_states=True, return_dict=False)
        assert isinstance(base, tuple)
        assert_same(base[-1], expected.hidden_states)


def test_some_of_them():
    local, remote = tiny_pair("llama")
    with torch.no_grad():
        for some in (1, -1, [0, 2], [1, -2, 40]):
            expected = local(IDS, output_hidden_states=some).hidden_states
            actual = remote(IDS, output_hidden_states=some).hidden_states
            assert_same(actual, expected)


def test_asked_by_the_config_and_of_other_heads():
    local, remote = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for model in (local, remote):
        model.config.output_hidden_states = True
        model.config.pad_token_id = 0
    with torch.no_grad():
        expected = local(IDS, attention_mask=mask).hidden_states
        actual = remote(IDS, attention_mask=mask).hidden_states
    assert_same(
        [states[mask.bool()] for states in actual], [states[mask.bool()] for states in expected]
    )


def test_gradients_flow_from_all_of_them():
    local, remote = tiny_pair("llama")
    found = []
    for model in (local, remote):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        states = model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        loss = sum((number + 1) * each.square().mean() for number, each in enumerate(states))
        found.append(torch.autograd.grad(loss, embeddings)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))
