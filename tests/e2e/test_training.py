"""Fifty steps of training through real processes, two of which are killed on the way."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from tuned_reference import TunedReference

NUM_STEPS = 50
MIDDLE = BlockSpan(2, 4)


def curve(
    loss_of: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    happens: Callable[[str, int], None] = lambda when, step: None,
) -> list[float]:
    """The losses of a training run; ``happens`` is called before each half of each step."""
    ids = torch.randint(5, 60, (3, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
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


def test_a_loss_curve_outlives_servers(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "bloom", "bloom", num_hidden_layers=5)
    local = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = LocalSwarmConfig(
        model=str(source),
        spans=(BlockSpan(0, 2), MIDDLE, BlockSpan(4, 5)),
        dtype="float32",
        num_threads=1,
    )
    with LocalSwarm(config) as swarm:
        torch.manual_seed(0)
        remote = AutoDistributedModelForCausalLM.from_pretrained(
            str(source),
            initial_peers=list(swarm.initial_peers),
            dtype=torch.float32,
            tuning_mode="deep_ptune",
            pre_seq_len=4,
        )
        reference = TunedReference.of(local, remote)
        serving = [server for server in swarm.servers if server.blocks == MIDDLE]

        def happens(when: str, step: int) -> None:
            if (when, step) in (("backward", 15), ("forward", 35)):
                serving.append(swarm.add_server(MIDDLE))
                swarm.kill(serving[-2])

        def local_loss(batch: Tensor) -> Tensor:
            logits = reference.logits(batch)
            return cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

        expected = curve(local_loss, reference.leaves)
        trained = [parameter for parameter in remote.parameters() if parameter.requires_grad]
        actual = curve(lambda batch: remote(batch, labels=batch).loss, trained, happens)
    assert len(serving) == 3
    worst = max(abs(one - other) for one, other in zip(actual, expected, strict=True))
    assert worst < 1e-4, f"{worst:.1e}"
    assert expected[-1] < expected[0] - 0.05
