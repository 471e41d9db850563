"""Checks of hidden states and gradients before they are sent and after they are received.

Knows tensors only.
"""

import math

import torch
from torch import Tensor

from petals.errors import BadInput


def is_finite(values: Tensor) -> bool:
    """True if there is no NaN and no infinity."""
    # A finite sum proves it in one pass without a temporary; a sum may overflow, so it disproves
    # nothing.
    if not values.numel() or math.isfinite(values.sum().item()):
        return True
    return bool(torch.isfinite(values).all())


def check_states(hidden: Tensor) -> None:
    """Raises BadInput for states that are not floating point or not finite."""
    if not hidden.dtype.is_floating_point:
        raise BadInput(
            f"Hidden states are floating point, not {hidden.dtype}.",
            hint="Token ids go through the model's embeddings first.",
        )
    if not is_finite(hidden):
        raise BadInput(
            "Hidden states hold NaN or infinity.",
            hint="Check their source, for example prompts that diverged in training.",
        )


def check_width(hidden: Tensor, hidden_size: int) -> None:
    """Raises BadInput unless the last dimension of ``hidden`` is the model's."""
    if hidden.shape[-1] != hidden_size:
        raise BadInput(
            f"Hidden states have {hidden.shape[-1]} values, this model has {hidden_size}.",
            hint="Check that client and servers use the same model.",
        )
