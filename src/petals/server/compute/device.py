"""The device that jobs run on: its loaded blocks, its dtype, and how inputs get there.

A job receives a ``DeviceContext`` once, in ``Job.prepare``, and reaches the blocks and device
memory through it alone. Knows no network, no sessions and no scheduling.
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
    """The part of ``models.runtime.span.Span`` that jobs use."""

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
    """Loaded blocks (``runner``) on one device, and the activation memory that passes may use.

    Only the compute thread uses it.
    """

    runner: Runner
    torch_device: torch.device
    dtype: torch.dtype
    activation_budget: ActivationBudget

    def put(self, states: Tensor) -> Tensor:
        """``states`` in the blocks' dtype on the device. Raises BadInput for NaN or infinity."""
        check_values(states)
        return self.place(states)

    def place(self, values: Tensor) -> Tensor:
        """The same for gradients, which may hold NaN and infinity (``BackwardPass``)."""
        return values.to(self.torch_device, self.dtype)

    def put_adapter(self, adapter: Adapter) -> Adapter:
        """The same for an adapter. Raises AdapterRefused for NaN or infinity."""
        check_finite(adapter)
        return adapter.mapped(lambda tensor: tensor.to(self.torch_device, self.dtype))

    def synchronize(self) -> None:
        """Return when the device has finished all work queued so far."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)


def check_values(states: Tensor) -> None:
    """Raise BadInput if ``states`` hold NaN or infinity."""
    if states.numel():
        low, high = torch.aminmax(states)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise BadInput(
                "The states or prompts hold NaN or infinity.",
                hint="Look at the inputs, or at the blocks that ran before these.",
            )
