"""A tuned model over real servers: gradients, tokens and classes as by hand, also after a death."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, StoppingCriteria

from petals.client.model.auto import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
)
from petals.types import BlockSpan
from support.models import WriteModel
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm
from support.tuned_reference import TunedReference

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
NUM_PROMPTS = 4
CUTS = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5), BlockSpan(0, 3), BlockSpan(2, 5))
"""Every block is served twice, so that one server can be killed."""


@dataclass
class World:
    swarm: RealSwarm

    def tuned(
        self, mode: str, kind: type[AutoDistributedModel] = AutoDistributedModelForCausalLM
    ) -> PreTrainedModel:
        torch.manual_seed(5)
        options = {"tuning_mode": mode, "pre_seq_len": NUM_PROMPTS, "num_labels": 3}
        settings = {"prefill_chunk_tokens": 3, "repair_timeout": 30.0}
        remote = self.swarm.model(kind, **options, **settings)
        if mode == "deep_ptune":
            with torch.no_grad():
                remote.intermediate_prompt_embeddings.weight.normal_(std=0.3)
        return remote

    def reference(self, remote: PreTrainedModel) -> TunedReference:
        return TunedReference.of(self.swarm.local, remote)


@pytest.fixture(params=["llama", "bloom"])
def world(request: pytest.FixtureRequest, tiny_folder: WriteModel) -> Iterator[World]:
    with real_swarm(tiny_folder(request.param), *CUTS, max_step_tokens=64) as swarm:
        yield World(swarm)


def prompts_of(remote: PreTrainedModel) -> list[torch.Tensor]:
    return [p for name, p in remote.named_parameters() if "prompt_embeddings" in name]


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_training_and_generation(world: World, mode: str) -> None:
    remote = world.tuned(mode)
    reference = world.reference(remote)
    loss = remote(IDS, labels=IDS).loss
    loss.backward()
    expected = reference.logits(IDS)
    wanted = cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    for parameter, gradient in zip(prompts_of(remote), reference.gradients(), strict=True):
        assert_close(parameter.grad, gradient)
    for more in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 6} | more
        assert torch.equal(
            remote.generate(IDS[:1], **options), reference.generate(IDS[:1], **options)
        )
    mask = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])
    words = remote.generate(IDS * mask, attention_mask=mask, max_new_tokens=5)
    for row, real in enumerate(mask.bool()):
        alone = reference.generate(IDS[row : row + 1, real], max_new_tokens=5)
        assert torch.equal(words[row, -5:], alone[0, -5:])


class KillAt(StoppingCriteria):
    """Kills a server of the running session when a sequence has a given number of tokens."""

    def __init__(self, swarm: RealSwarm, remote: PreTrainedModel, length: int) -> None:
        self.swarm, self.remote, self.length = swarm, remote, length
        self.num_killed = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if input_ids.shape[1] == self.length and not self.num_killed:
            self.swarm.kill(self.remote.active_session.trace.hops[-1].peer_id)
            self.num_killed = 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_server_dies_while_a_tuned_model_speaks(world: World) -> None:
    remote = world.tuned("deep_ptune")
    reference = world.reference(remote)
    expected = reference.generate(IDS[:1], max_new_tokens=8)
    with remote.inference_session(max_length=30) as session:
        remote.generate(IDS[:1], max_new_tokens=1)
        session.position = 0
        killer = KillAt(world.swarm, remote, IDS.shape[1] + 3)
        actual = remote.generate(IDS[:1], max_new_tokens=8, stopping_criteria=[killer])
        assert killer.num_killed == 1
        assert session.trace.repairs
    assert torch.equal(actual, expected)
