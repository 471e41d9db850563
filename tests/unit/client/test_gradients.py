"""Whole sequences are differentiable: inputs and deep prompts, block by block."""

import pytest
import torch

from petals.errors import BadInput, NotSupported
from support.local_blocks import tiny_pair
from support.reference import assert_close

HIDDEN = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = torch.randn(5, 2, 3, 32, generator=torch.Generator().manual_seed(1))
ONE_PROMPT = PROMPTS[:, :1]
"""The same prompts for all rows."""


@pytest.fixture(scope="module")
def blocks():
    return tiny_pair("llama")[1].model.layers


def test_gradients_of_inputs_and_of_prompts_block_by_block(blocks):
    hidden, prompts = HIDDEN.clone().requires_grad_(), PROMPTS.clone().requires_grad_()
    leaves = hidden, prompts
    found = torch.autograd.grad(blocks(hidden, prompts=prompts).square().mean(), leaves)
    states = hidden
    for block, layer in enumerate(blocks):
        states = layer(states + torch.nn.functional.pad(prompts[block], (0, 0, 0, 3)))
    assert_close(found, torch.autograd.grad(states.square().mean(), leaves))
    assert found[1].abs().sum(dim=(1, 2, 3)).gt(0).all()


def test_one_prompt_for_all_rows_in_a_pass_and_in_a_session(blocks):
    with torch.no_grad():
        expected = blocks(HIDDEN, prompts=ONE_PROMPT.expand(-1, 2, -1, -1))
        assert_close(blocks(HIDDEN, prompts=ONE_PROMPT), expected)
        with blocks.inference_session(max_length=6, prompts=ONE_PROMPT[:, 0]):
            parts = [blocks(HIDDEN[:, :2]), blocks(HIDDEN[:, 2:4]), blocks(HIDDEN[:, 4:])]
    assert_close(torch.cat(parts, dim=1), expected)


def test_prompts_of_no_length_are_none(blocks):
    with torch.no_grad():
        assert torch.equal(blocks(HIDDEN, prompts=PROMPTS[:, :, :0]), blocks(HIDDEN))


@pytest.mark.parametrize("wrong", [PROMPTS[:4], PROMPTS[:, 0], PROMPTS.repeat(1, 2, 1, 1)])
def test_prompts_of_another_shape_are_refused(blocks, wrong):
    with pytest.raises(BadInput, match="Prompts"):
        blocks(HIDDEN, prompts=wrong)


def test_a_session_has_one_prompt_for_all_rows_and_gives_no_gradients(blocks):
    with pytest.raises(BadInput, match="Prompts"):
        blocks.open_session(prompts=PROMPTS)
    with blocks.inference_session(max_length=4), pytest.raises(NotSupported, match="session"):
        blocks(HIDDEN.clone().requires_grad_())
