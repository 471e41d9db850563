"""Keys and values that move from a server that leaves to the one that takes its place.

They are read here between the batches of other sessions and written there as they are: nothing is
computed again. All but ``KVCopy`` belongs to the compute thread. Knows no peers and no messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petals.errors import SessionGap
from petals.server.compute.device import DeviceContext, check_values
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_job import StepPlan, arrange_rows


@dataclass(slots=True, weakref_slot=True, eq=False)
class KVCopy:
    """Rows that are read part by part, as far as ``plan`` goes, while steps run in between.

    Steps may add tokens to the rows meanwhile. A step that cuts or reorders them spoils the copy:
    the parts already read belong to rows that are no more.
    """

    plan: StepPlan
    is_spoilt: bool = False

    def see(self, step: StepPlan) -> None:
        """A step begins."""
        ends = self.plan.lengths_after
        cuts = any(start < end for start, end in zip(step.starts, ends))
        self.is_spoilt |= step.reorder is not None or cuts

    def check(self) -> None:
        """Raises SessionGap if what was read last may belong to other rows."""
        if self.is_spoilt:
            raise SessionGap(
                "The rows were cut or reordered while their keys and values were read.",
                hint="Ask for a new replay.",
            )


@torch.inference_mode()
def read_kv(kv: SessionKV, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """What the blocks keep of ``counts[r]`` tokens of row r from ``starts[r]``, row after row, on
    the CPU: [sum(counts), kv width].
    """
    parts = [
        row.read(start, start + count)
        for row, start, count in zip(kv.rows, starts, counts)
        if count
    ]
    empty = torch.empty(0, kv.layout.kv_width(kv.blocks), dtype=kv.layout.kv_dtype)
    return torch.cat(parts).cpu() if parts else empty


@torch.inference_mode()
def write_kv(
    device: DeviceContext, kv: SessionKV, plan: StepPlan, values: Tensor, outputs: Tensor | None
) -> None:
    """Bring the rows to where ``plan`` begins and append ``values``, which were read elsewhere.

    values: [plan.num_tokens, kv width]. Raises BadInput (NaN or infinity, also in ``outputs``),
    CacheFull or RequestTooLarge; the rows are then as before.
    """
    for given in (values, outputs):
        if given is not None:
            check_values(given)
    placed = values.to(device.torch_device)
    arrange_rows(kv, plan)
    for run in plan.pieces(0, plan.num_tokens):
        part = placed[run.offset : run.offset + run.count]
        kv.rows[run.row].write(run.start, part, kv.layout)
