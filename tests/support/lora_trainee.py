"""A user who trains an adapter through a swarm, for tests that start another process."""

from pathlib import Path

import torch

from petals import AutoDistributedModelForCausalLM


def train(model: torch.nn.Module, ids: torch.Tensor, num_steps: int) -> list[float]:
    """Train the parameters that require gradients; returns the loss of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learn(
    folder: Path, peers: list[str], adapter: Path, ids: torch.Tensor, num_steps: int
) -> list[float]:
    """Continue the training of ``adapter`` and save it; returns the loss of each step."""
    torch.set_num_threads(1)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=peers, dtype=torch.float32
    )
    model.load_adapter(adapter, is_trainable=True)
    losses = train(model, ids, num_steps)
    model.save_adapter(adapter)
    return losses
