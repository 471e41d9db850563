"""What results are compared with: inputs that a seed determines, and one measure of closeness."""

from collections.abc import Sequence

import torch
from torch import Tensor

from petals.models.verify.tiny import HIDDEN_SIZE

EXACT = 1e-5
"""Largest error of f32 sums taken in another order, as a share of the largest value."""


def states(num_tokens: int, seed: int = 0, width: int = HIDDEN_SIZE) -> Tensor:
    """Random hidden states [num_tokens, width]."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids of the tiny models' vocabulary, none of them special."""
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(
    actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], tolerance: float = EXACT
) -> None:
    """Tensors, or lists of them, are of the same shape and differ by at most ``tolerance`` of the
    largest expected value. Expected values that are all zero fail: they would prove nothing.
    """
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.shape == other.shape, (one.shape, other.shape)
        one, other = one.detach().float(), other.detach().float()
        if other.numel():
            error, scale = float((one - other).abs().max()), float(other.abs().max())
            assert scale > 0, "only zeros are expected"
            # Written so that NaN fails.
            assert error <= tolerance * scale, f"error {error:.1e} at values up to {scale:.1e}"
