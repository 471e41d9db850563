"""Pages of KV memory on their way from a server that leaves to the one that takes its place.

Read here between the batches of others, written there as they are: nothing is computed anew. All
but ``PageCopy`` belongs to the compute thread. Knows no peers and no messages.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from petals.errors import SessionGap
from petals.server.compute.device import DeviceContext, check_values
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_job import arrange_rows, cut_rows
from petals.server.compute.step_plan import StepPlan, TokenRun


@dataclass(slots=True, weakref_slot=True, eq=False)
class PageCopy:
    """Rows that are read as far as ``plan`` goes while steps go on, as long as these only add to
    them.
    """

    plan: StepPlan
    is_spoilt: bool = False

    def see(self, step: StepPlan) -> None:
        """A step begins; what it cuts or reorders can be read no more."""
        ends = self.plan.lengths_after
        cuts = any(start < end for start, end in zip(step.starts, ends))
        self.is_spoilt |= step.reorder is not None or cuts

    def check(self) -> None:
        """Raises SessionGap if what was read last may be of other rows."""
        if self.is_spoilt:
            raise SessionGap(
                "The rows were cut or reordered while their pages were read.", hint="Ask again."
            )


@torch.inference_mode()
def read_pages(kv: SessionKV, pieces: Iterable[TokenRun]) -> Tensor:
    """What the blocks keep of these tokens, on the CPU: [tokens, page width]."""
    parts = [kv.rows[p.row].read(p.start, p.start + p.count) for p in pieces]
    empty = torch.empty(0, kv.layout.kv_width(kv.blocks), dtype=kv.layout.kv_dtype)
    return torch.cat(parts).cpu() if parts else empty


@torch.inference_mode()
def write_pages(
    device: DeviceContext, kv: SessionKV, plan: StepPlan, pages: Tensor, outputs: Tensor | None
) -> None:
    """Bring the rows to where ``plan`` begins, and let them go on with ``pages``, read elsewhere.

    Raises BadInput (NaN or infinity, in ``outputs``, too), CacheFull or RequestTooLarge; the rows
    are then as before.
    """
    for given in (pages, outputs):
        if given is not None:
            check_values(given)
    arrange_rows(kv, plan)
    cut_rows(kv, plan)
    placed = pages.to(device.torch_device)
    for piece in plan.pieces(0, plan.num_tokens):
        part = placed[piece.offset : piece.offset + piece.count]
        kv.rows[piece.row].write(piece.start, part, kv.layout)
