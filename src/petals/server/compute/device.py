"""Where work runs: the loaded blocks, their device and dtype, and how inputs get there.

Knows no network, no peers and no scheduling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from petals.errors import BadInput
from petals.models.adapters.low_rank import Adapter, check_finite
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Mode
from petals.server.compute.activation_budget import ActivationBudget
from petals.types import BlockSpan


class Runner(Protocol):
    """What a pass needs of a span."""

    @property
    def blocks(self) -> BlockSpan: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def weights(self) -> frozenset[int]: ...

    def run(self, segments: Sequence[Segment]) -> list[Tensor]: ...
    def trace(self, segments: Sequence[Segment]) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class DeviceContext:
    """Where passes run. ``allowance``: the memory that graphs may take there."""

    runner: Runner
    device: torch.device
    dtype: torch.dtype
    allowance: ActivationBudget


def place_states(place: DeviceContext, states: Tensor) -> Tensor:
    """States as the blocks want them. Raises BadInput if one is not finite."""
    check_values(states)
    return states.to(place.device, place.dtype)


def check_values(states: Tensor) -> None:
    """Raises BadInput if one of them is not finite."""
    if states.numel():
        low, high = torch.aminmax(states)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise BadInput(
                "The states, prompts or gradients hold NaN or infinity.",
                hint="Look at the inputs, at the loss, or at the blocks that ran before these.",
            )


def place_adapter(place: DeviceContext, adapter: Adapter) -> Adapter:
    """An adapter as the blocks want it. Raises AdapterRefused if a value is not finite."""
    check_finite(adapter)
    return adapter.mapped(lambda tensor: tensor.to(place.device, place.dtype))
