"""A session for synchronous callers: run tokens through remote blocks, roll back, reorder, close.

The session alone knows which columns its rows hold. It records a rollback or a new order of rows
and sends it with the next step. One step is one call into the event loop. ``SessionCache`` shows
the session to transformers as a cache whose keys and values stay on the servers. Knows hidden
states; knows no model, no text and no sampling (it only stores what belongs to them).
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from petals.client.connection.event_loop import client_loop
from petals.client.model.padding import Rows, pack, unpack
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.routing.wire_dtype import wire_dtype_of
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.trace import SessionTrace
from petals.errors import BadInput, NotSupported, SessionClosed, SessionGap
from petals.types import BlockSpan
from petals.wire.tensors import narrowed


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

    def step_columns(self, hidden: Tensor, new: Rows) -> Tensor:
        """Run new columns [rows, columns, H] that ``read_columns`` found to follow the session's.

        Returns the same shape, with zeros on padding. A step that fails changes nothing. Raises
        like ``step``.
        """
        past = self.columns if self.columns.num_rows else Rows.empty(new.num_rows)
        return self._run(hidden, past, new)

    def _run(self, hidden: Tensor, past: Rows, new: Rows) -> Tensor:
        order = past.origin
        if order == tuple(range(len(self._rows.lengths))):
            order = None
        packed = pack(hidden.detach(), new.real)
        if self._wire_dtype is not None:
            packed = narrowed(packed, self._wire_dtype)
        # Starts before a row's end on the servers roll that row back; the order comes first.
        rope_lengths = self._next_rope_lengths(past, new)
        step = self._rows.step(packed, past.lengths, new.lengths, order, rope_lengths)
        output = client_loop.run(step)
        self.columns, self._rope_lengths = past.joined(new), rope_lengths or ()
        return unpack(output.to(hidden), new.real)

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
        client_loop.run(self._rows.close())


def _close_soon(rows: SessionRows) -> None:
    """Close a session that was garbage-collected, in whichever thread that happened."""
    if rows.is_open:
        client_loop.start(rows.close)


class SessionCache(Cache):
    """A session as ``past_key_values``: a full `Cache`, so that `generate` works in all its modes.

    ``open_session(max_length)`` is called once, by ``open``. Closing the cache (a context manager)
    closes the session. Sequences of a tuned model begin with trained prompts, which only its own
    forward sees (``shown_whole``): for all other code column 0 is the first one after the prompts.
    """

    def __init__(self, open_session: Callable[[int | None], InferenceSession]) -> None:
        super().__init__(layers=[_SessionLayer(self)])
        self._open_session: Callable[[int | None], InferenceSession] | None = open_session
        self._session: InferenceSession | None = None
        self._shows_prompts = False

    @classmethod
    def of(cls, session: InferenceSession) -> "SessionCache":
        """The cache of a session that its owner opened and will close; always the same object."""
        if session.past_key_values is None:
            cache = cls(lambda max_length: session)
            cache.open()
            session.past_key_values = cache
        found: SessionCache = session.past_key_values
        return found

    def __enter__(self) -> "SessionCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def open(self, max_length: int | None = None) -> InferenceSession:
        """The session, opened now if it was not, for ``max_length`` tokens per row.

        The servers reserve that at the first step; None lets the session grow. Raises
        SessionClosed.
        """
        if self._open_session is None:
            raise SessionClosed(
                "The session of these past_key_values is closed.",
                hint="Keep it open with `with model.inference_session(max_length=...) as session`.",
            )
        if self._session is None:
            self._session = self._open_session(max_length)
        return self._session

    def close(self) -> None:
        """Free the session's memory on the servers. Further steps raise SessionClosed."""
        session, self._session, self._open_session = self._session, None, None
        if session is not None:
            session.close()

    @contextmanager
    def shown_whole(self) -> Iterator[None]:
        """Count the prompts as columns, too, while the model's own forward runs."""
        self._shows_prompts = True
        try:
            yield
        finally:
            self._shows_prompts = False

    @property
    def columns(self) -> Rows:
        """All columns of the session, prompts included; no rows before the first step."""
        return Rows.empty(0) if self._session is None else self._session.columns

    @property
    def visible(self) -> Rows:
        """The columns that the caller may know of at present."""
        return self.columns.behind(self._num_hidden)

    @property
    def _num_hidden(self) -> int:
        if self._session is None or self._shows_prompts:
            return 0
        return self._session.num_prompt_tokens

    # What transformers reads

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(0, self.columns.num_columns - self._num_hidden)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        max_length = None if self._session is None else self._session.max_length
        return -1 if max_length is None else max_length - self._num_hidden

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        return self.columns.num_rows or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns.num_rows > 0

    @property
    def is_croppable(self) -> bool:
        return True

    def activate_past_recording(self) -> None:
        """Does nothing: a session can always be rolled back."""

    # What `generate` changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; the count is negative or zero."""
        if tokens_to_remove > 0:
            raise BadInput(
                f"crop({tokens_to_remove}): the number of tokens to remove is given as negative.",
                hint="crop(-3) removes the last three tokens.",
            )
        if self._session is not None:
            num_kept = max(0, self.columns.num_columns + tokens_to_remove)
            self._session.columns = self.columns.cut(num_kept)

    def reset(self) -> None:
        """Remove all columns; the session stays open."""
        self.crop(-self.get_seq_length())

    def begin_anew(self) -> None:
        """Remove all columns, also those of trained prompts; the next step runs them again."""
        if self._session is not None:
            self._session.columns = self.columns.cut(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """New row r continues old row ``beam_idx[r]``."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(self.columns.num_rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self._session is not None and self.is_initialized:
            self._session.columns = self.columns.select(rows)


class _SessionLayer(CacheLayerMixin):
    """The one layer of the cache, for code that reads ``cache.layers``."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: SessionCache) -> None:
        super().__init__()
        self._cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise _no_tensors()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise _no_tensors()

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._cache.get_max_length()


def _no_tensors() -> NotSupported:
    return NotSupported(
        "Keys and values of remote blocks stay on the servers and cannot be read or written here.",
        hint="Let the model fill this cache; run local layers with a DynamicCache of their own.",
    )
