"""What the cache of one token is, block by block, and the row that holds it.

The layout is not looked up in a table of architectures: a dry run through the loaded blocks tells
what each block writes. Knows no sessions and no budgets; the server counts, this module stores.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from petals.errors import LengthExceeded, SessionGap
from petals.models.runtime.recurrent import RecurrentRow
from petals.types import BlockSpan

MIN_SLAB_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """What one block keeps of one row.

    key_shape and value_shape are (heads, width) of one token's two tensors, (0, 0) if the block
    writes none; for MLA they are the latent and the rotary part. state_bytes is the size of a
    recurrent state, independent of length.
    """

    key_shape: tuple[int, int] = (0, 0)
    value_shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    state_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row adds in this block."""
        key, value = self.key_shape, self.value_shape
        return (key[0] * key[1] + value[0] * value[1]) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The layouts of a span's blocks. ``input_bytes`` are kept per token to replay recurrence."""

    span: BlockSpan
    blocks: tuple[BlockLayout, ...]
    input_bytes: int = 0

    def of(self, block: int) -> BlockLayout:
        return self.blocks[block - self.span.start]

    def token_bytes(self, blocks: BlockSpan) -> int:
        """Bytes that one token of one row takes in ``blocks``."""
        parts = self.blocks[blocks.start - self.span.start : blocks.end - self.span.start]
        return sum(part.token_bytes for part in parts) + self.input_bytes

    @property
    def page_dtype(self) -> torch.dtype | None:
        """The dtype of everything that is kept; None if that is more than so many values per token
        (recurrent states, several dtypes): then it cannot be read out and written elsewhere.
        """
        dtypes = {part.dtype for part in self.blocks if part.token_bytes}
        has_states = any(part.state_bytes for part in self.blocks)
        return dtypes.pop() if len(dtypes) == 1 and not has_states else None

    def kv_width(self, blocks: BlockSpan) -> int:
        """Values that one token of one row takes in ``blocks``, if there is a ``page_dtype``."""
        dtype = self.page_dtype
        return 0 if dtype is None else self.token_bytes(blocks) // dtype.itemsize

    def state_bytes(self, blocks: BlockSpan) -> int:
        """Bytes that one row takes in ``blocks`` before its first token, snapshots included."""
        parts = self.blocks[blocks.start - self.span.start : blocks.end - self.span.start]
        return sum(part.state_bytes for part in parts) * (1 + RecurrentRow.MAX_SNAPSHOTS)


class KVRow(Protocol):
    """What models ask of the place where one row's keys and values live."""

    length: int
    max_length: int
    recurrent: RecurrentRow | None

    def append(
        self, block: int, start: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [heads, n, width] at position ``start``; return views [heads, start + n, width].

        Whatever the block held from ``start`` on is forgotten. Raises SessionGap if positions
        before ``start`` were never written, LengthExceeded beyond the row's maximum.
        """

    def commit(self, length: int) -> None:
        """All blocks now hold ``length`` tokens; later ones are forgotten."""


class _Slab:
    __slots__ = ("filled", "keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        self.keys, self.values, self.filled = keys, values, filled

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class SlabRow:
    """A row in contiguous memory: one slab [heads, capacity, width] per block and tensor.

    Slabs start small and double up to ``max_length``, so that real memory follows use. Attention
    reads them through views, without gathering.
    """

    __slots__ = ("_slabs", "blocks", "length", "max_length", "recurrent")

    def __init__(self, blocks: BlockSpan, max_length: int) -> None:
        self.blocks = blocks
        self.max_length = max_length
        self.length = 0
        self.recurrent: RecurrentRow | None = None
        self._slabs: list[_Slab | None] = [None] * len(blocks)

    def append(
        self, block: int, start: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See KVRow.append."""
        count = key.shape[1]
        end = start + count
        slab = self._slabs[block - self.blocks.start]
        if slab is None or end > slab.keys.shape[1] or start > slab.filled:
            slab = self._make_room(block, start, end, (key, value))
        slab.keys.narrow(1, start, count).copy_(key)
        slab.values.narrow(1, start, count).copy_(value)
        slab.filled = end
        return slab.keys.narrow(1, 0, end), slab.values.narrow(1, 0, end)

    def _make_room(
        self, block: int, start: int, end: int, like: tuple[torch.Tensor, torch.Tensor]
    ) -> _Slab:
        old = self._slabs[block - self.blocks.start]
        filled = old.filled if old is not None else 0
        if start > filled:
            raise SessionGap(f"Block {block} holds {filled} tokens, position {start} is a gap.")
        if end > self.max_length:
            raise LengthExceeded(
                f"The step ends at position {end}, the session was opened for {self.max_length}.",
                hint="Open the session with a larger max_length.",
            )
        if old is not None and end <= old.capacity:
            return old
        doubled = max(MIN_SLAB_TOKENS, end, 2 * old.capacity if old is not None else 0)
        keys, values = (
            tensor.new_empty((tensor.shape[0], min(doubled, self.max_length), tensor.shape[2]))
            for tensor in like
        )
        if old is not None:
            keys[:, :filled] = old.keys[:, :filled]
            values[:, :filled] = old.values[:, :filled]
        slab = self._slabs[block - self.blocks.start] = _Slab(keys, values, filled)
        return slab

    def commit(self, length: int) -> None:
        """See KVRow.commit."""
        self.length = length
        for slab in self._slabs:
            if slab is not None and slab.filled > length:
                slab.filled = length

    def read(self, start: int, end: int) -> torch.Tensor:
        """A copy of positions ``start`` to ``end`` in all blocks: [end - start, page width].

        Block by block, keys before values. Raises SessionGap beyond the row's end.
        """
        if end > self.length:
            raise SessionGap(f"The row holds {self.length} tokens, {end} were asked for.")
        kept = [tensor for slab in self._slabs if slab for tensor in (slab.keys, slab.values)]
        return torch.cat([tensor[:, start:end].transpose(0, 1).flatten(1) for tensor in kept], 1)

    def write(self, start: int, pages: torch.Tensor, layout: KVLayout) -> None:
        """Let the row go on from ``start`` with what another one's ``read`` gave: [n, page width].

        Raises what ``append`` raises.
        """
        width_done = 0
        for block in range(self.blocks.start, self.blocks.end):
            part, pair = layout.of(block), []
            for heads, width in (part.key_shape, part.value_shape):
                columns = pages[:, width_done : width_done + heads * width]
                pair.append(columns.unflatten(1, (heads, width)).transpose(0, 1))
                width_done += heads * width
            if part.token_bytes:
                self.append(block, start, *pair)
        self.commit(start + len(pages))

    def truncate(self, length: int) -> None:
        """Forget positions from ``length`` on. Memory stays with the row."""
        if not 0 <= length <= self.length:
            raise SessionGap(f"Cannot cut a row of {self.length} tokens to {length}.")
        self.commit(length)

    def set_limit(self, max_length: int) -> None:
        """Allow up to ``max_length`` tokens."""
        self.max_length = max_length
        if self.recurrent is not None:
            self.recurrent.max_length = max_length

    def fork(self) -> "SlabRow":
        """An independent copy of the tokens kept so far."""
        twin = SlabRow(self.blocks, self.max_length)
        twin.length = self.length
        twin.recurrent = self.recurrent.fork() if self.recurrent is not None else None
        for index, slab in enumerate(self._slabs):
            if slab is not None:
                kept = min(slab.filled, self.length)
                keys, values = torch.empty_like(slab.keys), torch.empty_like(slab.values)
                keys[:, :kept] = slab.keys[:, :kept]
                values[:, :kept] = slab.values[:, :kept]
                twin._slabs[index] = _Slab(keys, values, kept)
        return twin

    def release(self) -> None:
        """Give the memory back."""
        self._slabs = [None] * len(self.blocks)
        self.recurrent = None
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        slabs = sum(slab.num_bytes for slab in self._slabs if slab is not None)
        return slabs + (self.recurrent.num_bytes if self.recurrent is not None else 0)

    def storages(self) -> set[int]:
        """Addresses of the slabs, to prove that rows share none."""
        return {slab.keys.data_ptr() for slab in self._slabs if slab is not None}
