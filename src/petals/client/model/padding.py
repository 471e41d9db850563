"""Padded batches as ragged rows: which columns hold tokens, and where each row's tokens begin.

transformers passes a batch as a rectangle [rows, columns] with a mask; servers receive the tokens
of each row without padding. Masks and positions that cannot be expressed that way are refused.
Knows no session, no model and no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from petals.errors import BadInput, NotSupported

UNKNOWN = -1
"""First position of a row that has no token yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch of rows, column by column.

    real: [rows, columns] bool, False on padding. first: [rows] int64, the position id of each row's
    first token, or UNKNOWN. origin: row r continues row ``origin[r]`` of the latest step, None if
    every row continues itself.
    """

    real: Tensor
    first: Tensor
    origin: tuple[int, ...] | None = None

    @classmethod
    def empty(cls, num_rows: int) -> "Rows":
        """Rows without columns."""
        real = torch.ones(num_rows, 0, dtype=torch.bool)
        return cls(real, torch.full((num_rows,), UNKNOWN))

    @classmethod
    def full(cls, num_rows: int, num_columns: int) -> "Rows":
        """Rows without padding, from position 0."""
        real = torch.ones(num_rows, num_columns, dtype=torch.bool)
        return cls(real, torch.zeros(num_rows, dtype=torch.int64))

    @property
    def num_rows(self) -> int:
        return self.real.shape[0]

    @property
    def num_columns(self) -> int:
        return self.real.shape[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens in each row."""
        return tuple(self.real.sum(1).tolist())

    def select(self, rows: Sequence[int]) -> "Rows":
        """Row r becomes a copy of what is row ``rows[r]`` now. Raises BadInput for other rows."""
        if list(rows) == list(range(self.num_rows)):
            return self
        if not all(0 <= row < self.num_rows for row in rows):
            raise BadInput(
                f"Rows {list(rows)} are not all among the {self.num_rows} rows of the session.",
                hint="Rows are counted from 0.",
            )
        origin = rows if self.origin is None else [self.origin[row] for row in rows]
        index = torch.tensor(rows)
        return Rows(self.real[index], self.first[index], tuple(origin))

    def cut(self, num_columns: int) -> "Rows":
        """The first ``num_columns`` columns."""
        return replace(self, real=self.real[:, :num_columns])

    def cut_to_position(self, position: int) -> "Rows":
        """The columns that leave at most ``position`` tokens in every row."""
        longest = self.real.cumsum(1).amax(0)
        return self.cut(int((longest <= position).sum()))

    def behind(self, num_columns: int) -> "Rows":
        """The columns after the first ``num_columns``."""
        return replace(self, real=self.real[:, num_columns:]) if num_columns else self

    def joined(self, new: "Rows") -> "Rows":
        """These columns, then those of ``new``, which follow them; the order is done."""
        return Rows(torch.cat([self.real, new.real], dim=1), new.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnLayout:
    """What the caller of a transformers model says of the new columns.

    ``follows_mask``: without ``position_ids`` this model numbers tokens by the mask, not by column.
    """

    num_rows: int
    num_columns: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    follows_mask: bool = False


def read_columns(past: Rows, layout: ColumnLayout) -> Rows:
    """The new columns of a batch whose earlier columns are ``past`` (without rows: there are none).

    Raises BadInput for another number of rows and for a mask or positions of the wrong shape,
    NotSupported for masks that are not plain padding and for positions with gaps.
    """
    past = past if past.num_rows else Rows.empty(layout.num_rows)
    if past.num_rows != layout.num_rows:
        raise BadInput(
            f"The batch has {layout.num_rows} rows, its session has {past.num_rows}.",
            hint="Use one session per batch; batch_select_indices changes the rows of a cache.",
        )
    real = _read_mask(past, layout)
    if layout.attention_mask is None and bool(past.real.all()):
        first = past.first if past.num_columns else torch.zeros_like(past.first)
        columns = torch.arange(past.num_columns, past.num_columns + layout.num_columns)
        given = layout.position_ids if layout.position_ids is not None else columns.expand_as(real)
        if torch.equal(given.cpu(), first[:, None] + columns):
            return Rows(real, first)  # the usual case, once per generated token
    return Rows(real, _first_positions(past, real, _positions(past, real, layout)))


def pack(hidden: Tensor, real: Tensor) -> Tensor:
    """[rows, columns, H] -> [tokens, H], row after row, without padding."""
    if bool(real.all()):
        return hidden.reshape(-1, hidden.shape[-1])
    return hidden[real.to(hidden.device)]


def unpack(packed: Tensor, real: Tensor) -> Tensor:
    """[tokens, H] -> [rows, columns, H] with zeros on padding."""
    if bool(real.all()):
        return packed.view(*real.shape, packed.shape[-1])
    hidden = packed.new_zeros(*real.shape, packed.shape[-1])
    return hidden.index_put((real.to(packed.device),), packed)


def to_left_padding(mask: Tensor) -> Tensor | None:
    """The column order [rows, columns] that moves padding to the left; None if it is there."""
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return None
    return mask.argsort(dim=1, stable=True)


def reorder_columns(values: Tensor, order: Tensor) -> Tensor:
    """[rows or 1, columns, ...] -> [rows, columns, ...]: column c of row r is ``order[r, c]``."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    return values.expand(len(order), *values.shape[1:])[rows, order]


def _read_mask(past: Rows, layout: ColumnLayout) -> Tensor:
    num_rows, num_past = past.real.shape
    mask = layout.attention_mask
    if mask is None:
        return torch.ones(num_rows, layout.num_columns, dtype=torch.bool)
    if mask.ndim != 2:
        raise NotSupported(
            f"An attention mask of {mask.ndim} dimensions cannot be sent to the servers.",
            hint="Pass a mask of shape [batch, tokens] with ones on tokens and zeros on padding.",
        )
    expected = (num_rows, num_past + layout.num_columns)
    if tuple(mask.shape) != expected:
        raise BadInput(
            f"The attention mask has shape {tuple(mask.shape)} instead of {expected}.",
            hint="It covers all tokens of the session so far and the new ones.",
        )
    mask = mask.cpu()
    real = mask.bool()
    if not bool((mask == real).all()):
        raise NotSupported(
            "The attention mask holds values other than 0 and 1.",
            hint="Only padding can be masked: ones on tokens, zeros on padding.",
        )
    if not torch.equal(real[:, :num_past], past.real):
        raise NotSupported(
            "The attention mask differs from the one the earlier tokens were run with.",
            hint="Keep its earlier columns, or crop the cache before them.",
        )
    return real[:, num_past:]


def _positions(past: Rows, real: Tensor, layout: ColumnLayout) -> Tensor:
    """Positions [rows, columns] of the new columns, as the model will number them."""
    num_rows, num_columns = real.shape
    positions = layout.position_ids
    if positions is None:
        if layout.follows_mask:
            return (past.real.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        columns = torch.arange(past.num_columns, past.num_columns + num_columns)
        return columns.expand(num_rows, -1)
    positions = positions.cpu()
    if positions.ndim == 3:
        if not bool((positions == positions[:1]).all()):
            raise NotSupported(
                "Positions in several dimensions cannot be sent to the servers.",
                hint="Pass position_ids of shape [batch, tokens].",
            )
        positions = positions[0]
    if positions.ndim != 2 or positions.shape[1] != num_columns:
        raise BadInput(
            f"position_ids have shape {tuple(positions.shape)}, not [{num_rows}, {num_columns}].",
            hint="Pass one position for each new token.",
        )
    return positions.expand(num_rows, -1)


def _first_positions(past: Rows, real: Tensor, positions: Tensor) -> Tensor:
    """Position of each row's first token [rows]. Raises NotSupported if a row has a gap."""
    num_before = past.real.sum(1, keepdim=True)
    # Each token implies where its row began; without gaps all tokens of a row imply the same.
    implied = positions - num_before - real.cumsum(1) + 1
    biggest = torch.iinfo(torch.int64).max
    begun = num_before[:, 0] > 0
    lowest = implied.masked_fill(~real, biggest).amin(1) if real.shape[1] else past.first
    first = torch.where(begun, past.first, lowest)
    if bool(((implied != first[:, None]) & real).any()):
        raise NotSupported(
            "The positions of a row's tokens do not follow each other.",
            hint="Leave position_ids out, or number all tokens of a row without gaps, those of "
            "its session first: position_ids = (mask.cumsum(-1) - 1).clamp(min=0).",
        )
    return torch.where(real.any(1) | begun, first, UNKNOWN)


def positions_follow_mask(config: PretrainedConfig) -> bool:
    """Whether the model, given no positions, numbers tokens by the mask and not by column."""
    return config.model_type in ("bloom", "opt", "biogpt") or bool(getattr(config, "alibi", False))
