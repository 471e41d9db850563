"""Low-rank adapters as values: the matrices of blocks that they change, and what they add.

``adapters.files`` reads them, ``runtime.lora_hooks`` applies them. Knows no files, no peers and no
running model.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from petals.errors import AdapterRefused
from petals.types import BlockSpan

Slot = tuple[int, str]
"""A matrix of a block: the number of the block and the path of the module inside it."""

Slots = Mapping[Slot, tuple[int, int]]
"""The matrices that can take an adapter, with (input width, output width)."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What is added to the output of one matrix for an input x: ``scaling * (x @ a.T) @ b.T``.

    a: [rank, in]; b: [out, rank].
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """The low-rank parts of an adapter, by slot in order.

    Adapters with equal content have equal digests. In a packed batch the segments with the same
    ``LowRank`` objects are computed together, so sessions should share one Adapter object.
    """

    parts: Mapping[Slot, LowRank]
    _cuts: dict[BlockSpan, "Adapter | None"] = field(default_factory=dict, init=False, repr=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All matrices in order: a and b of the first part, a and b of the second, ..."""
        return tuple(tensor for part in self.parts.values() for tensor in (part.a, part.b))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of slots, ranks, scalings, dtypes, shapes and values: equal for equal content."""
        found = hashlib.sha256()
        for (block, module), part in self.parts.items():
            found.update(f"{block} {module} {part.rank} {part.scaling!r}\0".encode())
            for tensor in (part.a, part.b):
                values = tensor.detach().cpu().contiguous()
                found.update(f"{values.dtype} {tuple(values.shape)}\0".encode())
                found.update(values.reshape(-1).view(torch.uint8).numpy())
        return f"sha256:{found.hexdigest()}"

    def within(self, blocks: BlockSpan) -> "Adapter | None":
        """The parts for ``blocks``; None if there are none. Returns the same object every time."""
        kept = {slot: part for slot, part in self.parts.items() if slot[0] in blocks}
        if kept and len(kept) == len(self.parts):
            return self
        if blocks not in self._cuts:
            self._cuts[blocks] = Adapter(kept) if kept else None
        return self._cuts[blocks]

    def leaves(self, blocks: BlockSpan) -> "Adapter | None":
        """A copy of the parts for ``blocks`` whose matrices are autograd leaves; None if none."""
        part = self.within(blocks)
        if part is None:
            return None
        return part.mapped(lambda tensor: tensor.detach().requires_grad_())

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Adapter":
        """The same slots with other matrices, given in the order of ``self.tensors``."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return Adapter(
            {
                slot: replace(part, a=a, b=b)
                for (slot, part), (a, b) in zip(self.parts.items(), pairs, strict=True)
            }
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        """The same slots with ``change`` applied to every matrix, for example to move it."""
        return self.with_tensors([change(tensor) for tensor in self.tensors])


def check_fits(adapter: Adapter, slots: Slots) -> None:
    """Raise AdapterRefused unless every part fits a slot in ``slots``.

    Checks names, shapes, dtypes and scalings; ``check_finite`` checks the values.
    """
    for (block, module), part in adapter.parts.items():
        found = slots.get((block, module))
        if found is None:
            raise AdapterRefused(f"Block {block} has no matrix {module!r}.", hint=_why_none(module))
        if part.a.dim() != 2 or part.b.dim() != 2 or part.a.shape[0] != part.b.shape[1]:
            raise AdapterRefused(
                f"The matrices for {module} of block {block} are {list(part.a.shape)} and "
                f"{list(part.b.shape)}.",
                hint="They are A [rank, in] and B [out, rank] of one rank.",
            )
        if (part.a.shape[1], part.b.shape[0]) != found:
            raise AdapterRefused(
                f"{module} of block {block} maps {found[0]} to {found[1]} values, the adapter "
                f"{part.a.shape[1]} to {part.b.shape[0]}.",
                hint="It was made for another model.",
            )
        if not part.a.is_floating_point() or not part.b.is_floating_point():
            raise AdapterRefused("The matrices of an adapter are floating point.")
        if not math.isfinite(part.scaling):
            raise AdapterRefused(f"The scaling of {module} of block {block} is not finite.")


def check_finite(adapter: Adapter) -> None:
    """Raise AdapterRefused if a matrix contains NaN or infinity."""
    for (block, module), part in adapter.parts.items():
        if not all(bool(tensor.isfinite().all()) for tensor in (part.a, part.b)):
            raise AdapterRefused(
                f"The adapter for {module} of block {block} holds NaN or infinity.",
                hint="Its training went wrong; use an earlier state of it.",
            )


def _why_none(module: str) -> str:
    if "experts" in module.split("."):
        return "Experts are kept as one block of memory and take no adapter; adapt the attention."
    return "The adapter was made for another model, or for a part that is no linear layer."
