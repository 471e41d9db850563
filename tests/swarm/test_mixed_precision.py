"""Training with autocast and a gradient scaler takes, and skips, the steps of the local model.

Servers compute in their own dtype, so the blocks of the local model run without autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from petals import LoraConfig
from petals.types import BlockSpan
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm
from support.tuned_reference import TunedReference

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
SPANS = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
NUM_STEPS = 6


@contextmanager
def swarm_of(folder: Path, dtype: str) -> Iterator[RealSwarm]:
    with real_swarm(folder, *SPANS, max_step_tokens=64, dtype=dtype) as swarm:
        for layer in swarm.local.model.layers:
            layer.forward = partial(without_autocast, layer.forward)
        yield swarm


def without_autocast(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return forward(*args, **kwargs)


def reference_loss(reference: TunedReference, ids: Tensor) -> Tensor:
    logits = reference.logits(ids).float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    loss_of: Any, leaves: list[nn.Parameter], cast: torch.dtype | None, scale: float
) -> tuple[list[float], list[float]]:
    """(losses, scales) of some steps."""
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-7)
    losses, scales = [], []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
            loss = loss_of(IDS)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, scales


@pytest.mark.parametrize(
    ("dtype", "cast", "scale", "mode"),
    [
        ("float32", torch.float16, 2.0**16, "ptune"),
        ("float32", torch.float16, 2.0**40, "deep_ptune"),
        ("float32", torch.bfloat16, 1.0, "deep_ptune"),
        ("float32", None, 2.0**127, "ptune"),
        ("bfloat16", None, 2.0**127, "deep_ptune"),
        ("float16", None, 2.0**20, "ptune"),
    ],
)
def test_steps_are_those_of_the_local_model(
    llama: Path, dtype: str, cast: torch.dtype | None, scale: float, mode: str
) -> None:
    with swarm_of(llama, dtype) as swarm:
        torch.manual_seed(5)
        remote = swarm.model(tuning_mode=mode, pre_seq_len=4, dtype=getattr(torch, dtype))
        reference = TunedReference.of(swarm.local, remote)
        leaves = [p for p in remote.parameters() if p.requires_grad]
        actual = train(partial(loss_under, remote), leaves, cast, scale)
        expected = train(partial(reference_loss, reference), reference.leaves, cast, scale)
        assert actual[1] == expected[1]
        exact = dtype == "float32" and cast is None
        assert actual[0] == pytest.approx(expected[0], rel=1e-5 if exact else 0.02)
        assert (actual[1][0] < scale) == (scale > 2.0**16)
        assert actual[0][-1] < actual[0][0]
        assert all(bool(p.isfinite().all()) for p in leaves)
        assert_close([leaves[0]], [reference.prompts], 1e-4 if exact else 0.05)


@pytest.mark.parametrize(("cast", "scale"), [(torch.float16, 2.0**40), (None, 2.0**127)])
def test_an_adapter_takes_the_steps_of_peft(
    llama: Path, tmp_path: Path, cast: torch.dtype | None, scale: float
) -> None:
    with swarm_of(llama, "float32") as swarm:
        remote = swarm.model()
        remote.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        remote.save_adapter(tmp_path)
        local = peft.PeftModel.from_pretrained(swarm.local, tmp_path, is_trainable=True).eval()
        found = []
        for model in (remote, local):
            leaves = [p for p in model.parameters() if p.requires_grad]
            loss_of = partial(loss_under, model)
            found.append(train(loss_of, leaves, cast, scale))
        (losses, scales), (expected, expected_scales) = found
        assert scales == expected_scales
        assert losses == pytest.approx(expected, rel=0.02 if cast else 1e-5)
        assert losses[-1] < losses[0]


def loss_under(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss
