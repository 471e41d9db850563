"""Gradients through real servers, over a network in memory, are those of the whole local model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from petals.types import BlockSpan
from support.models import WriteModel
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm
from support.tuned_reference import TunedReference

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
ROOM = {"cache_tokens": 1024, "max_step_tokens": 8192}
IDS = torch.randint(5, 60, (3, 29), generator=torch.Generator().manual_seed(2))
LEFT = (torch.arange(29) >= torch.tensor([[0], [9], [4]])).long()


@pytest.fixture(scope="module", params=FAMILIES)
def swarm(request: pytest.FixtureRequest, tiny_folder: WriteModel) -> Iterator[RealSwarm]:
    with real_swarm(tiny_folder(request.param), *SPANS, **ROOM) as swarm:
        yield swarm


def embedded(model: torch.nn.Module) -> Tensor:
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


def test_gradients_of_inputs_and_of_all_hidden_states(swarm: RealSwarm) -> None:
    remote, found = swarm.model(), []
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


def test_gradients_of_prompts(swarm: RealSwarm) -> None:
    torch.manual_seed(4)
    remote = swarm.model(tuning_mode="deep_ptune", pre_seq_len=4)
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


def gradient(model: torch.nn.Module) -> Tensor:
    embeds = embedded(model)
    model(inputs_embeds=embeds, attention_mask=LEFT).logits[LEFT.bool()].square().mean().backward()
    return embeds.grad


def test_bf16(llama: Path) -> None:
    with real_swarm(llama, *SPANS, dtype="bfloat16", **ROOM) as swarm:
        found = gradient(swarm.model(dtype=torch.bfloat16))
        assert found.dtype == torch.bfloat16
        assert_close(found, gradient(swarm.local), tolerance=0.05)
