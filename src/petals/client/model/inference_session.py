"""A session for synchronous callers: run tokens through remote blocks, roll back, reorder, close.

The session alone knows which columns its rows hold. It records a rollback or a new order of rows
and sends it with the next step. One step is one call into the event loop. ``session_cache`` shows
the session to transformers. Knows hidden states; knows no model, no text and no sampling (it only
stores what belongs to them).
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache

from petals.client.connection.event_loop import client_loop
from petals.client.model.padding import Rows, pack, unpack
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.routing.wire_dtype import wire_dtype_of
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.trace import SessionTrace
from petals.errors import BadInput, NotSupported, SessionGap
from petals.models.runtime.rope_lengths import per_token
from petals.types import BlockSpan
from petals.wire.tensors import narrowed


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Columns from which a session can be begun anew, without any memory on servers.

    hidden: the inputs of the first block, [rows, columns, H]. rope_lengths: [rows, columns] int64,
    0 for padding. num_prompt_tokens: how many of the columns are trained prompts.
    """

    hidden: Tensor
    columns: Rows
    rope_lengths: Tensor
    num_prompt_tokens: int = 0

    @classmethod
    def of_forward(cls, hidden: Tensor, columns: Rows, num_prompt_tokens: int) -> "Recording":
        """Columns that ran in one forward."""
        lengths = torch.tensor(columns.lengths)[:, None] * columns.real
        return cls(hidden, columns, lengths, num_prompt_tokens)

    @property
    def longest_since_empty(self) -> tuple[int, ...]:
        """Most tokens that each row has had since it was empty."""
        return tuple(self.rope_lengths.amax(dim=1).tolist()) if self.columns.num_columns else ()

    def cut(self, num_columns: int) -> "Recording":
        """The first ``num_columns`` columns."""
        columns = self.columns.cut(num_columns)
        kept = slice(num_columns)
        return replace(
            self,
            hidden=self.hidden[:, kept],
            columns=columns,
            rope_lengths=self.rope_lengths[:, kept],
        )

    def select(self, rows: list[int]) -> "Recording":
        """New row r is old row ``rows[r]``. Raises BadInput for rows that do not exist."""
        columns = replace(self.columns.select(rows), origin=None)
        lengths = self.rope_lengths[rows]
        return replace(self, hidden=self.hidden[rows], columns=columns, rope_lengths=lengths)


class InferenceSession:
    """KV caches of a batch on the servers of the manager's blocks.

    ``max_length`` tokens in each of ``num_rows`` rows (default: as many as the first step has) are
    reserved on the servers at the first step. With ``max_length=None`` memory is reserved as the
    rows grow, and a step may raise CacheFull. ``tuning``: prompts and adapter of this client alone.
    Use the session as a context manager, or ``close`` it. Raises BadInput for ``max_length`` < 1.
    """

    def __init__(
        self,
        manager: RemoteSequenceManager,
        max_length: int | None = None,
        *,
        num_rows: int | None = None,
        tuning: Tuning | None = None,
        open_rows: Callable[..., SessionRows] = SessionRows,
    ) -> None:
        self.manager = manager  # the connection is closed with the last manager that uses it
        self.output_ids: Tensor | None = None
        """[rows, tokens] int64: all token ids of the session. Written by `generate`."""
        self.past_key_values: Cache | None = None
        """The session as transformers sees it. Written by the model."""
        self.num_prompt_tokens = 0
        """Columns before the first of ``output_ids``: trained prompts. Written by the model."""
        self.in_use = threading.RLock()
        """Held by a `generate` that continues the session; one from another thread waits."""
        self._longest: tuple[int, ...] = ()
        """Most tokens that each row has had since it was empty."""
        self.dynamic_rope_limit: int | None = None
        """Tokens from which on dynamic rope scaling changes the factors. Written by the model."""
        self._rope_lengths: tuple[int, ...] = ()
        """Of the latest step, by row: see ``_next_rope_lengths``."""
        self.columns = Rows.empty(0)
        """What the rows hold, column by column; no rows before the first step.

        Columns that were cut, or whose rows were selected, can be assigned: the next step continues
        those. ``output_ids`` stay.
        """
        self._wire_dtype = wire_dtype_of(manager, "rpc_inference")
        self._rows = open_rows(
            manager.access, manager.blocks, max_length=max_length, num_rows=num_rows, tuning=tuning
        )
        self._dropped = weakref.finalize(self, _close_soon, self._rows)
        self._dropped.atexit = False

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def blocks(self) -> BlockSpan:
        return self._rows.blocks

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None until a server has set it, if no length was requested."""
        return self._rows.max_length

    @property
    def num_rows(self) -> int | None:
        """Rows of the session; None if the first step is to set it."""
        return self.columns.num_rows or len(self._rows.lengths) or None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in every row; empty before the first step."""
        return self.columns.lengths

    @property
    def position(self) -> int:
        """Tokens in the longest row. Set it to a lower value to roll back, without a request.

        ``output_ids`` are cut at the same column. Setting raises SessionGap for a position that
        was never reached.
        """
        return max(self.columns.lengths, default=0)

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise SessionGap(
                f"Position {position} was never reached; the session is at {self.position}.",
                hint="A session's position can only be set back.",
            )
        if position == self.position:
            return
        self.columns = self.columns.cut_to_position(position)
        if self.output_ids is not None:
            num_kept = max(0, self.columns.num_columns - self.num_prompt_tokens)
            self.output_ids = self.output_ids[:, :num_kept]

    @property
    def last_token_id(self) -> Tensor | None:
        """The last column of ``output_ids``."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @last_token_id.setter
    def last_token_id(self, value: Tensor) -> None:
        if self.output_ids is None:
            raise BadInput("The session has no output yet.", hint="Call generate() first.")
        self.output_ids[:, -1:] = value

    @property
    def trace(self) -> SessionTrace:
        """Route, timings and repairs of the latest steps."""
        return self._rows.trace

    def step(
        self,
        inputs: Tensor,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """Run tokens through the blocks, after those of every row.

        inputs: [batch, tokens, hidden] floating; tokens may be 0. hypo_ids: [batch] int64, the row
        that each row continues. Returns [batch, tokens, hidden], same dtype and device. A step that
        fails changes nothing. Raises BadInput, LengthExceeded, BatchTooLarge, RouteError,
        CacheFull, PeerError, SessionClosed, and NotSupported for prompts, which are given at the
        opening.
        """
        if prompts is not None and prompts.numel():
            raise NotSupported(
                "A session's deep prompts cannot change from step to step.",
                hint="Open it with them: model.inference_session(..., prompts=prompts).",
            )
        if inputs.dim() != 3:
            raise BadInput(
                f"Inputs are [batch, tokens, hidden], not {list(inputs.shape)}.",
                hint="A single sequence has batch 1: inputs[None].",
            )
        batch, tokens, _ = inputs.shape
        past = self.columns if self.columns.num_rows else Rows.empty(batch)
        if hypo_ids is not None:
            past = past.select(hypo_ids.flatten().tolist())
        real = torch.ones(batch, tokens, dtype=torch.bool)
        return self._run(inputs, past, Rows(real, past.first.clamp(min=0)))

    def step_columns(self, hidden: Tensor, new: Rows, rope_lengths: Tensor | None = None) -> Tensor:
        """Run new columns [rows, columns, H] that ``read_columns`` found to follow the session's.

        rope_lengths: [rows, columns] int64; None: those of one forward. Returns the same shape as
        ``hidden``, with zeros on padding. A step that fails changes nothing. Raises like ``step``.
        """
        past = self.columns if self.columns.num_rows else Rows.empty(new.num_rows)
        return self._run(hidden, past, new, rope_lengths)

    def _run(
        self, hidden: Tensor, past: Rows, new: Rows, rope_lengths: Tensor | None = None
    ) -> Tensor:
        order = past.origin
        if order == tuple(range(len(self._rows.lengths))):
            order = None
        packed = pack(hidden.detach(), new.real)
        if self._wire_dtype is not None:
            packed = narrowed(packed, self._wire_dtype)
        by_row, by_token = self._next_rope_lengths(past, new), None
        if rope_lengths is not None:
            by_row = tuple(rope_lengths.amax(dim=1).tolist())
            by_token = tuple(pack(rope_lengths[..., None], new.real).flatten().tolist())
        elif by_row is not None:
            by_token = per_token(by_row, new.lengths)
        # Starts before a row's end on the servers roll that row back; the order comes first.
        step = self._rows.step(packed, past.lengths, new.lengths, order, by_token)
        output = client_loop.run(step)
        self.columns, self._rope_lengths = past.joined(new), by_row or ()
        longest = self.longest_since_empty(past)
        self._longest = tuple(map(max, longest, self.columns.lengths))
        return unpack(output.to(hidden), new.real)

    def fork(self, max_length: int | None = None) -> "InferenceSession":
        """A second session that goes on from the same tokens; neither changes the other. Close it.

        The servers copy their keys and values, so that no token runs again. Where one of them
        cannot, other servers compute the copy from what this client has sent. max_length: most
        tokens per row of the fork; None: as many as here. Raises SessionClosed, the errors of
        opening a session, and RouteError if the copy had to be computed and the inputs were not
        kept (``max_kept_bytes``).
        """
        if max_length is not None:
            max_length += self.num_prompt_tokens
        rows = client_loop.run(self._rows.fork(max_length))
        fork = InferenceSession(self.manager, open_rows=lambda *args, **kwargs: rows)
        fork.columns, fork.num_prompt_tokens = self.columns, self.num_prompt_tokens
        fork._wire_dtype, fork._rope_lengths = self._wire_dtype, self._rope_lengths
        fork.dynamic_rope_limit, fork._longest = self.dynamic_rope_limit, self._longest
        fork.output_ids = None if self.output_ids is None else self.output_ids.clone()
        return fork

    def __deepcopy__(self, memo: dict[int, object]) -> "InferenceSession":
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise NotSupported(
            "A session cannot be pickled: its keys and values are on servers, for this client.",
            hint="Pickle its output_ids, or its cache: model.cache_of(session).",
        )

    def recorded(self) -> Recording | None:
        """What the session has run; None if it is nothing, or was not kept (max_kept_bytes)."""
        columns = replace(self.columns, origin=None)
        work = self._rows.inputs(columns.lengths, self.columns.origin)
        inputs = client_loop.run(work) if columns.num_columns else None
        if inputs is None:
            return None
        hidden = unpack(inputs.hidden, columns.real)
        lengths = unpack(torch.tensor(inputs.rope_lengths)[:, None], columns.real)[..., 0]
        return Recording(hidden, columns, lengths, self.num_prompt_tokens)

    def longest_since_empty(self, columns: Rows) -> tuple[int, ...]:
        """Most tokens that each row of ``columns``, which continue the session's, has had since it
        was empty.
        """
        order = columns.origin or range(columns.num_rows)
        known = [self._longest[row] if row < len(self._longest) else 0 for row in order]
        return tuple(most if length else 0 for most, length in zip(known, columns.lengths))

    def _next_rope_lengths(self, past: Rows, new: Rows) -> tuple[int, ...] | None:
        """Rope lengths of the rows' next tokens; None: the lengths of the rows after the step.

        With dynamic scaling, transformers keeps the factors of the longest text that a model has
        run until it runs one below the limit, also if tokens were taken back meanwhile (drafts).
        Here each row has such a memory.
        """
        limit, before = self.dynamic_rope_limit, self._rope_lengths
        if limit is None:
            return None
        lengths = [have + more for have, more in zip(past.lengths, new.lengths)]
        order = past.origin or range(len(lengths))
        kept = [before[row] if row < len(before) else 0 for row in order]
        return tuple(
            max(length, old) if length >= limit else length for length, old in zip(lengths, kept)
        )

    def close(self) -> None:
        """Free what the servers hold. Idempotent; a step afterwards raises SessionClosed."""
        self._dropped.detach()
        client_loop.finish(self._rows.close)


def _close_soon(rows: SessionRows) -> None:
    """Close a session that was garbage-collected, in whichever thread that happened."""
    if rows.is_open:
        client_loop.start(rows.close)
