"""Whole sequences are differentiable: inputs, deep prompts and adapters, block by block."""

import pytest
import torch

from petals.errors import BadInput, NotSupported
from support.local_blocks import tiny_pair

HIDDEN = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = torch.randn(5, 2, 3, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def blocks():
    return tiny_pair("llama")[1].model.layers


def test_gradients_of_a_slice_and_of_prompts_block_by_block(blocks):
    hidden, prompts = HIDDEN.clone().requires_grad_(), PROMPTS.clone().requires_grad_()
    blocks(hidden, prompts=prompts).square().mean().backward()
    wanted = hidden.grad, prompts.grad
    states, hidden.grad, prompts.grad = hidden, None, None
    for block, layer in enumerate(blocks):
        added = torch.nn.functional.pad(prompts[block], (0, 0, 0, 3))
        states = layer(states + added)
    states.square().mean().backward()
    torch.testing.assert_close((hidden.grad, prompts.grad), wanted)
    assert wanted[1].abs().amin(dim=(1, 2, 3)).ge(0).all()
    assert wanted[1].abs().sum(dim=(1, 2, 3)).gt(0).all()


def test_one_prompt_for_all_rows(blocks):
    prompts = PROMPTS[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(
            blocks(HIDDEN, prompts=prompts),
            blocks(HIDDEN, prompts=prompts.expand(-1, 2, -1, -1)),
        )


def test_a_session_adds_its_prompts_once_and_where_they_belong(blocks):
    prompts = PROMPTS[:, 0]
    with torch.no_grad():
        whole = blocks(HIDDEN, prompts=prompts[:, None])
    with torch.no_grad(), blocks.inference_session(max_length=6, prompts=prompts):
        parts = [blocks(HIDDEN[:, :2]), blocks(HIDDEN[:, 2:4]), blocks(HIDDEN[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_prompts_of_no_length_are_none(blocks):
    with torch.no_grad():
        assert torch.equal(blocks(HIDDEN, prompts=PROMPTS[:, :, :0]), blocks(HIDDEN))


def test_prompts_that_do_not_fit(blocks):
    for wrong in (PROMPTS[:4], PROMPTS[:, 0], PROMPTS.expand(5, 2, 3, 32).repeat(1, 2, 1, 1)):
        with pytest.raises(BadInput, match="Prompts"):
            blocks(HIDDEN, prompts=wrong)
    with pytest.raises(BadInput, match="Prompts"):
        blocks.open_session(prompts=PROMPTS)


def test_a_session_gives_no_gradients(blocks):
    with blocks.inference_session(max_length=4), pytest.raises(NotSupported, match="session"):
        blocks(HIDDEN.clone().requires_grad_())
