"""Padded batches as ragged rows: which places hold tokens, and whether these follow each other.

A batch of transformers is a rectangle [rows, columns] with a mask; what travels is each row without
its padding. Refuses, typed, what only a whole attention mask could express. Knows no session, no
model and no network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from petals.errors import BadInput, NotSupported

UNKNOWN = -1
"""First position of a row that has no token yet."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of a batch: ``real`` [rows, columns] bool, False on padding.

    ``first`` [rows] int64 is the position of each row's first token, as the model numbers it.
    """

    real: Tensor
    first: Tensor

    @classmethod
    def empty(cls, num_rows: int) -> "Rows":
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
        """Tokens per row."""
        return tuple(self.real.sum(1).tolist())

    def select(self, rows: list[int]) -> "Rows":
        return Rows(self.real[rows], self.first[rows])

    def cut(self, num_columns: int) -> "Rows":
        """The first ``num_columns`` columns."""
        return Rows(self.real[:, :num_columns], self.first)

    def behind(self, num_columns: int) -> "Rows":
        """The columns after the first ``num_columns``."""
        return Rows(self.real[:, num_columns:], self.first) if num_columns else self

    def joined(self, new: "Rows") -> "Rows":
        """These columns and, after them, those of ``new``, which was read as their continuation."""
        return Rows(torch.cat([self.real, new.real], dim=1), new.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnLayout:
    """What a caller says of the new columns, as transformers' models take it.

    ``follows_mask``: without ``position_ids`` this model numbers tokens by the mask, not by column.
    """

    num_columns: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    follows_mask: bool = False


def read_columns(past: Rows, layout: ColumnLayout) -> Rows:
    """The new columns of a batch whose earlier columns are ``past``.

    Raises BadInput for a mask or positions of the wrong shape, NotSupported for masks that are not
    plain padding and for positions that do not follow each other.
    """
    real = _read_mask(past, layout)
    if layout.attention_mask is None and bool(past.real.all()):
        first = past.first if past.num_columns else torch.zeros_like(past.first)
        columns = torch.arange(past.num_columns, past.num_columns + layout.num_columns)
        told = layout.position_ids if layout.position_ids is not None else columns.expand_as(real)
        if torch.equal(told.cpu(), first[:, None] + columns):
            return Rows(real, first)  # the usual case, once for every token
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
    """The order [rows, columns] that brings each row's padding to its left; None if it is there."""
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return None
    return mask.argsort(dim=1, stable=True)


def _read_mask(past: Rows, layout: ColumnLayout) -> Tensor:
    num_rows, num_past = past.real.shape
    mask = layout.attention_mask
    if mask is None:
        return torch.ones(num_rows, layout.num_columns, dtype=torch.bool)
    if mask.ndim != 2:
        raise NotSupported(
            f"An attention mask of {mask.ndim} dimensions cannot travel to the servers.",
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
                "Positions in several dimensions cannot travel to the servers.",
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
    """Position of each row's first token; checks that the row's other tokens follow it."""
    num_before = past.real.sum(1, keepdim=True)
    implied = positions - num_before - real.cumsum(1) + 1
    biggest = torch.iinfo(torch.int64).max
    begun = num_before[:, 0] > 0
    lowest = implied.masked_fill(~real, biggest).amin(1) if real.shape[1] else past.first
    first = torch.where(begun, past.first, lowest)
    if bool(((implied != first[:, None]) & real).any()):
        raise NotSupported(
            "The positions of a row's tokens do not follow each other.",
            hint="Number tokens without gaps: position_ids = (mask.cumsum(-1) - 1).clamp(min=0); "
            "`generate` does so by itself.",
        )
    return torch.where(real.any(1) | begun, first, UNKNOWN)
