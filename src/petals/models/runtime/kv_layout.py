"""The layout of the key-value cache, block by block, and the row that stores it for one sequence.

The layout is not looked up in a table of architectures: ``probe`` runs the loaded blocks once and
records what each of them writes. This module stores; the budget of all sessions is kept by the
server's key-value pool. Knows no sessions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from petals.errors import LengthExceeded, SessionGap
from petals.models.runtime.recurrent import RecurrentRow
from petals.types import BlockSpan

MIN_SLAB_TOKENS = 64
"""Capacity (tokens) of a new slab; it doubles when it is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """What one block keeps for one row.

    key_shape, value_shape: (heads, width) of the two tensors of one token, (0, 0) if the block
    writes none. For MLA they are the latent vector and the rotary key.
    dtype: of both tensors.
    state_bytes: size of the recurrent state, which does not grow with the length.
    """

    key_shape: tuple[int, int] = (0, 0)
    value_shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    state_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes per token of one row in this block."""
        key, value = self.key_shape, self.value_shape
        return (key[0] * key[1] + value[0] * value[1]) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The layouts of the blocks of a span.

    ``input_bytes`` per token are kept in addition if any block is recurrent: the state [H] with
    which the token entered, for rollback (see ``recurrent``).
    """

    span: BlockSpan
    blocks: tuple[BlockLayout, ...]
    input_bytes: int = 0

    def of(self, block: int) -> BlockLayout:
        """The layout of ``block``, a number in the whole model."""
        return self.blocks[block - self.span.start]

    def token_bytes(self, blocks: BlockSpan) -> int:
        """Bytes per token of one row in ``blocks``."""
        parts = self.blocks[blocks.start - self.span.start : blocks.end - self.span.start]
        return sum(part.token_bytes for part in parts) + self.input_bytes

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """The dtype of all keys and values, if a row can be moved to another server as a tensor
        [tokens, ``kv_width``]. None if it cannot: it has recurrent states or several dtypes.
        """
        dtypes = {part.dtype for part in self.blocks if part.token_bytes}
        has_states = any(part.state_bytes for part in self.blocks)
        return dtypes.pop() if len(dtypes) == 1 and not has_states else None

    def kv_width(self, blocks: BlockSpan) -> int:
        """Number of values per token of one row in ``blocks``; 0 if ``kv_dtype`` is None."""
        dtype = self.kv_dtype
        return 0 if dtype is None else self.token_bytes(blocks) // dtype.itemsize

    def state_bytes(self, blocks: BlockSpan) -> int:
        """Bytes of one row in ``blocks`` that do not depend on its length.

        They are the recurrent states, once as they are and once per snapshot.
        """
        parts = self.blocks[blocks.start - self.span.start : blocks.end - self.span.start]
        return sum(part.state_bytes for part in parts) * (1 + RecurrentRow.MAX_SNAPSHOTS)


class KVRow(Protocol):
    """The storage of one row, as far as running blocks needs it.

    length: tokens that all blocks hold. max_length: most tokens it may hold. recurrent: states of
    recurrent blocks; None before the first step.
    """

    length: int
    max_length: int
    recurrent: RecurrentRow | None

    def append(
        self, block: int, start: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [heads, n, width] at position ``start``; return views [heads, start + n, width].

        Positions of the block after ``start + n`` are dropped. Raises SessionGap if positions
        before ``start`` have not been written, LengthExceeded if ``start + n > max_length``.
        """

    def commit(self, length: int) -> None:
        """Declare that all blocks hold ``length`` tokens; drop later ones."""


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

    A slab begins with ``MIN_SLAB_TOKENS`` and doubles up to ``max_length``, so that memory follows
    use and appending a token takes constant time on average. Attention reads a slab through a view;
    storage in pages would have to be gathered for every step.
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
            slab = self._grow(block, start, end, (key, value))
        slab.keys.narrow(1, start, count).copy_(key)
        slab.values.narrow(1, start, count).copy_(value)
        slab.filled = end
        return slab.keys.narrow(1, 0, end), slab.values.narrow(1, 0, end)

    def _grow(
        self, block: int, start: int, end: int, like: tuple[torch.Tensor, torch.Tensor]
    ) -> _Slab:
        old = self._slabs[block - self.blocks.start]
        filled = old.filled if old is not None else 0
        if start > filled:
            raise SessionGap(f"Block {block} holds {filled} tokens, position {start} is a gap.")
        if end > self.max_length:
            raise LengthExceeded(
                f"Maximum length exceeded: the step ends at position {end} in a session for "
                f"{self.max_length} tokens.",
                hint="Open the session with a larger max_length.",
            )
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
        """A copy of the positions [start, end) of all blocks: [end - start, ``kv_width``].

        The values of a token are ordered by block; keys come before values. Raises SessionGap if
        ``end > length``.
        """
        if end > self.length:
            raise SessionGap(f"The row holds {self.length} tokens, {end} were asked for.")
        kept = [tensor for slab in self._slabs if slab for tensor in (slab.keys, slab.values)]
        return torch.cat([tensor[:, start:end].transpose(0, 1).flatten(1) for tensor in kept], 1)

    def write(self, start: int, values: torch.Tensor, layout: KVLayout) -> None:
        """Replace the positions from ``start`` on by [n, ``kv_width``] that ``read`` returned.

        Raises what ``append`` raises.
        """
        width_done = 0
        for block in range(self.blocks.start, self.blocks.end):
            part, pair = layout.of(block), []
            for heads, width in (part.key_shape, part.value_shape):
                columns = values[:, width_done : width_done + heads * width]
                pair.append(columns.unflatten(1, (heads, width)).transpose(0, 1))
                width_done += heads * width
            if part.token_bytes:
                self.append(block, start, *pair)
        self.commit(start + len(values))

    def truncate(self, length: int) -> None:
        """Drop the positions from ``length`` on; the row keeps its memory.

        Raises SessionGap unless 0 <= length <= self.length.
        """
        if not 0 <= length <= self.length:
            raise SessionGap(f"Cannot cut a row of {self.length} tokens to {length}.")
        self.commit(length)

    def set_limit(self, max_length: int) -> None:
        """Allow ``max_length`` tokens from now on."""
        self.max_length = max_length
        if self.recurrent is not None:
            self.recurrent.max_length = max_length

    def fork(self, length: int | None = None, max_length: int | None = None) -> "SlabRow":
        """An independent copy of the first ``length`` tokens (None: of all), with a limit of its
        own (None: the same).

        Beams and sessions that continue from one row each need rows of their own, since both write
        at the same positions. The copy keeps the capacity of the slabs as far as its limit allows,
        so that appending to it does not copy the tokens a second time; only positions in use are
        copied.
        """
        limit = self.max_length if max_length is None else max_length
        copied = SlabRow(self.blocks, limit)
        copied.length = self.length if length is None else length
        copied.recurrent = None if self.recurrent is None else self.recurrent.fork(limit)
        for index, slab in enumerate(self._slabs):
            if slab is not None:
                kept, capacity = min(slab.filled, copied.length), min(slab.capacity, limit)
                keys, values = (
                    tensor.new_empty((tensor.shape[0], capacity, tensor.shape[2]))
                    for tensor in (slab.keys, slab.values)
                )
                keys[:, :kept] = slab.keys[:, :kept]
                values[:, :kept] = slab.values[:, :kept]
                copied._slabs[index] = _Slab(keys, values, kept)
        return copied

    def release(self) -> None:
        """Free the memory."""
        self._slabs = [None] * len(self.blocks)
        self.recurrent = None
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the row takes now."""
        slabs = sum(slab.num_bytes for slab in self._slabs if slab is not None)
        return slabs + (self.recurrent.num_bytes if self.recurrent is not None else 0)

    def storages(self) -> set[int]:
        """Addresses of the slabs, for checks that no two rows share memory."""
        return {slab.keys.data_ptr() for slab in self._slabs if slab is not None}
