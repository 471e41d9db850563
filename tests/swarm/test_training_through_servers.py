"""Gradients through real servers, over a network in memory, are those of the whole local model."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model_swarm import ModelSwarm, model_swarm
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from tuned_reference import TunedReference

pytestmark = pytest.mark.slow

FAMILIES = (
    "bloom",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gptj",
    "llama",
    "mixtral",
    "opt",
    "qwen3",
    "qwen3_next",
)
SPANS = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
IDS = torch.randint(5, 60, (3, 29), generator=torch.Generator().manual_seed(2))
LEFT = (torch.arange(29) >= torch.tensor([[0], [9], [4]])).long()


@pytest.fixture(scope="module", params=FAMILIES)
def swarm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelSwarm]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    with model_swarm(folder, *SPANS) as swarm:
        yield swarm


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def embedded(model: torch.nn.Module) -> Tensor:
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


def test_gradients_of_inputs_and_of_all_hidden_states(swarm: ModelSwarm) -> None:
    remote, found = swarm.client(), []
    for model in (swarm.local, remote):
        embeds = embedded(model)
        output = model(inputs_embeds=embeds, attention_mask=LEFT, output_hidden_states=True)
        states = [output.logits, *output.hidden_states]
        weights = torch.Generator().manual_seed(0)
        loss = sum(
            (each[LEFT.bool()] * torch.randn(each.shape[-1], generator=weights)).square().mean()
            for each in states
        )
        loss.backward()
        found.append((loss.detach(), embeds.grad))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])


def test_gradients_of_prompts(swarm: ModelSwarm) -> None:
    torch.manual_seed(4)
    remote = swarm.client({"tuning_mode": "deep_ptune", "pre_seq_len": 4})
    host = remote.blocks_host
    torch.nn.init.normal_(host.intermediate_prompt_embeddings.weight, std=0.1)
    reference = TunedReference.of(swarm.local, remote)
    wanted, given = embedded(swarm.local), embedded(remote)
    with reference.deep_prompts():
        whole = torch.cat([reference.prompts.expand(len(IDS), -1, -1), wanted], dim=1)
        logits = swarm.local(inputs_embeds=whole, use_cache=False).logits[:, 4:]
    logits.log_softmax(-1)[..., 7].sum().backward()
    remote(inputs_embeds=given).logits.log_softmax(-1)[..., 7].sum().backward()
    assert_close(given.grad, wanted.grad)
    trained = (host.prompt_embeddings.weight, host.intermediate_prompt_embeddings.weight)
    for parameter, expected in zip(trained, reference.gradients(), strict=True):
        assert_close(parameter.grad, expected)
