"""A tuned model over real servers: loss, gradients and tokens as by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from petals.types import BlockSpan
from support.models import WriteModel
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm
from support.tuned_reference import TunedReference

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "bloom"])
def swarm(request: pytest.FixtureRequest, tiny_folder: WriteModel) -> Iterator[RealSwarm]:
    spans = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
    with real_swarm(tiny_folder(request.param), *spans, max_step_tokens=64) as swarm:
        yield swarm


@pytest.fixture(params=["ptune", "deep_ptune"])
def remote(request: pytest.FixtureRequest, swarm: RealSwarm) -> PreTrainedModel:
    torch.manual_seed(5)
    remote = swarm.model(tuning_mode=request.param, pre_seq_len=4, prefill_chunk_tokens=3)
    if request.param == "deep_ptune":
        with torch.no_grad():
            remote.intermediate_prompt_embeddings.weight.normal_(std=0.3)
    return remote


@pytest.fixture
def reference(swarm: RealSwarm, remote: PreTrainedModel) -> TunedReference:
    return TunedReference.of(swarm.local, remote)


def test_loss_and_gradients(remote: PreTrainedModel, reference: TunedReference) -> None:
    loss = remote(IDS, labels=IDS).loss
    loss.backward()
    expected = reference.logits(IDS)
    wanted = cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    prompts = [p for name, p in remote.named_parameters() if "prompt_embeddings" in name]
    for parameter, gradient in zip(prompts, reference.gradients(), strict=True):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(
    remote: PreTrainedModel, reference: TunedReference, options: dict[str, int]
) -> None:
    options = {"max_new_tokens": 6} | options
    assert torch.equal(remote.generate(IDS[:1], **options), reference.generate(IDS[:1], **options))


def test_a_padded_batch(remote: PreTrainedModel, reference: TunedReference) -> None:
    mask = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])
    words = remote.generate(IDS * mask, attention_mask=mask, max_new_tokens=5)
    for row, real in enumerate(mask.bool()):
        alone = reference.generate(IDS[row : row + 1, real], max_new_tokens=5)
        assert torch.equal(words[row, -5:], alone[0, -5:])
