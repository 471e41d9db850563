"""A step of a session, decode or prefill, as a job.

Knows KV rows and the plan of the step; knows no messages, no peers and no scheduling.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.batch import Segment
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import BatchableJob
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_plan import StepPlan
from petals.types import BlockSpan

GROWTH_TOKENS = 256
"""A session opened without a maximum length extends its reservation by this many tokens a row."""


@dataclass(eq=False)
class StepJob(BatchableJob[Tensor]):
    """A checked step; its result is [plan.num_tokens, H] in ``out_dtype`` on the CPU.

    hidden: [plan.num_tokens, H], floating, on the CPU. prompts [len(blocks), P, H] and adapter are
    on the device. The job alone uses the rows of ``kv`` until it is done or aborted; ``has_begun``
    says whether it has reordered or cut them.
    """

    kv: SessionKV
    blocks: BlockSpan
    plan: StepPlan
    hidden: Tensor
    out_dtype: torch.dtype
    owner: str
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    has_begun: bool = field(default=False, init=False)
    _num_done: int = field(default=0, init=False)
    _outputs: list[Tensor] = field(default_factory=list, init=False)

    @property
    def session(self) -> Hashable:
        """See BatchableJob."""
        return id(self.kv)

    @property
    def cost_tokens(self) -> int:
        """See Job."""
        return self.plan.num_tokens

    @property
    def is_urgent(self) -> bool:
        """See Job."""
        return self.plan.is_decode

    @property
    def is_done(self) -> bool:
        """See Job."""
        return self._num_done >= self.plan.num_tokens

    def prepare(self, device: DeviceContext) -> None:
        """Bring the rows to where the step begins. Raises BadInput, CacheFull, RequestTooLarge;
        the rows are then as they were.
        """
        self.device = device
        self.hidden = device.put(self.hidden)
        arrange_rows(self.kv, self.plan)
        self.has_begun = True
        cut_rows(self.kv, self.plan)

    def segments(self, num_tokens: int) -> list[Segment]:
        """See BatchableJob."""
        return [
            Segment(
                hidden=self.hidden[run.offset : run.offset + run.count],
                blocks=self.blocks,
                row=self.kv.rows[run.row],
                start=run.start,
                adapter=self.adapter,
                prompts=self.prompts,
            )
            for run in self.plan.pieces(self._num_done, num_tokens)
        ]

    def accept(self, num_tokens: int, outputs: Sequence[Tensor]) -> None:
        """See BatchableJob."""
        self._outputs += outputs
        self._num_done += num_tokens

    def abort(self) -> None:
        """Let the rows end where the step began, so that it can be repeated."""
        if self.has_begun:
            cut_rows(self.kv, self.plan)

    def result(self) -> Tensor:
        """See the class."""
        # torch.cat copies even a single output: a view would keep the outputs of the whole batch in
        # memory for as long as the caller keeps this one.
        joined = torch.cat(self._outputs) if self._outputs else self.hidden
        return joined.to("cpu", self.out_dtype)


def arrange_rows(kv: SessionKV, plan: StepPlan) -> None:
    """Reserve memory for a step and reorder the rows as it says.

    Raises CacheFull or RequestTooLarge and changes no row.
    """
    longest = max(plan.lengths_after, default=0)
    if longest > kv.max_length:
        kv.extend(-(-longest // GROWTH_TOKENS) * GROWTH_TOKENS)
    if plan.reorder is not None:
        kv.reorder(plan.reorder)


def cut_rows(kv: SessionKV, plan: StepPlan) -> None:
    """Let every row end where the step begins."""
    for row, start in enumerate(plan.starts):
        kv.truncate(row, start)
