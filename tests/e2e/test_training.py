"""A real model is trained through real processes, two of which are killed."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals import AutoDistributedModelForCausalLM
from petals.testing.local_swarm import LocalSwarm
from petals.types import BlockSpan
from support.tuned_reference import TunedReference

NUM_STEPS = 24
KILLS = (("backward", 8), ("forward", 16))
NUM_TOKENS = 12
MIDDLE = BlockSpan(10, 20)
TEXTS = (
    "A swarm of small machines can hold what none of them could hold alone.",
    "The sky is green on Tuesdays and yellow whenever the baker is in Rome.",
)


def curve(
    ids: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    happens: Callable[[str, int], None] = lambda when, step: None,
) -> list[float]:
    """The losses of a training run; ``happens`` is called before each half of each step."""
    # Plain descent in small steps. Larger ones, and Adam's, amplify the last bits until two runs at
    # home that begin 1e-8 apart differ by more than what is allowed here.
    optimizer = torch.optim.SGD(parameters, lr=3e-4)
    losses = []
    for step in range(NUM_STEPS):
        happens("forward", step)
        loss = loss_of(ids)
        losses.append(loss.item())
        happens("backward", step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_loss_curve_outlives_servers(
    smollm2_path: Path,
    smollm2_local: PreTrainedModel,
    smollm2_swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = torch.tensor([tokenizer(text)["input_ids"][:NUM_TOKENS] for text in TEXTS])
    torch.manual_seed(0)
    remote = AutoDistributedModelForCausalLM.from_pretrained(
        str(smollm2_path),
        initial_peers=list(smollm2_swarm.initial_peers),
        dtype=torch.float32,
        tuning_mode="deep_ptune",
        pre_seq_len=4,
    )
    reference = TunedReference.of(smollm2_local, remote)
    swarm, kills = smollm2_swarm, []

    def happens(when: str, step: int) -> None:
        if (when, step) in KILLS:
            (victim,) = (server for server in swarm.servers if server.blocks == MIDDLE)
            swarm.add_servers(MIDDLE)
            swarm.kill(victim)
            kills.append(victim)

    def local_loss(batch: Tensor) -> Tensor:
        logits = reference.logits(batch)
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    expected = curve(ids, local_loss, reference.leaves)
    trained = [parameter for parameter in remote.parameters() if parameter.requires_grad]
    actual = curve(ids, lambda batch: remote(batch, labels=batch).loss, trained, happens)
    assert len(kills) == 2
    worst = max(abs(one - other) for one, other in zip(actual, expected, strict=True))
    assert worst < 1e-4, f"{worst:.1e}"
    assert expected[-1] < expected[0] - 0.02
