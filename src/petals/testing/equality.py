"""A check that the swarm's tokens are the local model's tokens.

In f32 two runs may differ only where the two best logits of the local model are almost equal:
packing and replay change the shapes of matrix products, so sums differ in their last bits. At the
first different token the difference of the two best local logits is computed and printed; above
``MAX_TIE_GAP`` the check fails. Must not know swarms.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TIE_GAP = 1e-4
"""Largest difference of the two best logits (f32) at which a swarm may choose the other token."""


def first_difference(expected: torch.Tensor, actual: torch.Tensor) -> int | None:
    """Index of the first token in which two int64 sequences [n] and [m] differ; None if equal."""
    shared = min(len(expected), len(actual))
    unequal = (expected[:shared] != actual[:shared]).nonzero()
    if len(unequal):
        return int(unequal[0])
    return None if len(expected) == len(actual) else shared


def top_two_gap(model: "PreTrainedModel", prefix: torch.Tensor) -> float:
    """Best minus second-best logit of the local ``model`` after the int64 ids ``prefix`` [n]."""
    with torch.inference_mode():
        logits = model(prefix[None]).logits[0, -1].float()
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


def assert_same_tokens(
    model: "PreTrainedModel", expected: torch.Tensor, actual: torch.Tensor
) -> None:
    """Check greedy ids [n] (int64, prompt included) of the local ``model`` and of the swarm.

    Raises AssertionError unless they are equal up to the first tie of the local model.
    """
    index = first_difference(expected, actual)
    if index is None:
        return
    gap = top_two_gap(model, expected[:index])
    report = (
        f"token {index}: expected {expected[index : index + 5].tolist()}, "
        f"got {actual[index : index + 5].tolist()}; local top-2 logit gap {gap:.2e}"
    )
    print(report)
    assert gap <= MAX_TIE_GAP, report
