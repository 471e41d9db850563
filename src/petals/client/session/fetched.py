"""Rows that a hop puts out again to us, where it cannot reach the hop that is to be refilled.

Checks and collects what comes; knows no servers and no channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from petals.client.connection.tensor_checks import is_finite
from petals.client.session.input_log import KeptInputs, Part
from petals.wire.messages import Step


class WrongRows(ValueError):
    """What came cannot be what was asked for; the text says why."""


@dataclass(slots=True)
class Fetched:
    """At most ``max_tokens`` of width ``hidden_size``, from ``starts`` on (empty: from position 0).

    ``reordered``: the rows stand as the reorder of the step to follow leaves them.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    starts: tuple[int, ...] = ()
    rows: KeptInputs = field(default_factory=lambda: KeptInputs(0))
    reordered: bool = False

    def add(self, step: Step, tensors: Sequence[Tensor]) -> None:
        """The next tokens of every row, as they would have gone to the next hop. Raises
        WrongRows.
        """
        if not self.rows.lengths:
            self.rows = KeptInputs(len(step.counts))
        num_tokens = sum(step.counts)
        starts = self.starts or (0,) * len(self.rows.lengths)
        due = tuple(start + come for start, come in zip(starts, self.rows.lengths))
        if step.starts != due or len(step.counts) != len(due):
            raise WrongRows("rows that do not follow each other")
        if sum(self.rows.lengths) + num_tokens > self.max_tokens:
            raise WrongRows("more rows than were asked for")
        shape = [tensor.shape for tensor in tensors]
        if shape != [(num_tokens, self.hidden_size)] or tensors[0].dtype != self.dtype:
            raise WrongRows("rows of another shape")
        if not is_finite(tensors[0]):
            raise WrongRows("NaN or infinity")
        self.rows.append(step.counts, tensors[0])
        self.reordered = step.reordered

    def part(self) -> Part | None:
        """What has come; None for nothing."""
        whole = self.rows.whole()
        return replace(whole, starts=self.starts) if whole is not None and self.starts else whole
