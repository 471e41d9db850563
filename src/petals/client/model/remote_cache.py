"""The cache without tensors: keys and values stay on the servers, this remembers where they end.

A full `Cache` of transformers, so that `generate` in all its modes works on it. Cropping,
reordering and repeating are only noted down; they ride on the next step and cost no trip.
Knows sessions by three methods and the network not at all.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from petals.client.model.padding import ColumnLayout, Rows, pack, read_columns, unpack
from petals.errors import BadInput, NotSupported, SessionClosed


class RowSession(Protocol):
    """What a cache needs of a session: rows in, rows out."""

    @property
    def position(self) -> int:
        """Tokens in the longest row."""
        ...

    def step_rows(
        self,
        hidden: Tensor,
        *,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
    ) -> Tensor:
        """Run packed rows [sum(counts), H]; ``reorder`` (new row -> old row) comes first."""
        ...

    def close(self) -> None: ...


SessionOpener = Callable[[int, int | None], RowSession]
"""(rows, max_length) -> an open session; without a length it grows as it goes."""


class RemoteCache(Cache):
    """Position of a session on the servers, in the form transformers expects.

    Opened at the first step, when the number of rows is known. ``max_length`` (tokens per row) is
    reserved on the servers at that moment; None lets the session grow. Usable as a context manager,
    which closes the session.

    A tuned model's sequences begin with ``num_prompt_tokens`` prompts, which only its own forward
    sees (`shown_whole`): to all others the first column is the first token behind them.
    """

    def __init__(
        self,
        open_session: SessionOpener,
        max_length: int | None = None,
        num_prompt_tokens: int = 0,
    ) -> None:
        super().__init__(layers=[_RemoteLayer(self)])
        self.max_length = max_length
        self._num_prompt_tokens = self._num_hidden = num_prompt_tokens
        self.is_of_same_ids = False
        """Whether the ids in generation begin with this cache's, or only continue them."""
        self.seen_ids: Tensor | None = None
        """All ids [rows, columns] of the generation under way, as it last looked at them."""
        self._open_session = open_session
        self._session: RowSession | None = None
        self._rows: Rows | None = None
        self._origin: list[int] | None = None  # new row -> row on the servers, None: unchanged
        self._closed = False
        self._seen_position = 0

    @classmethod
    def of(cls, session: Any, num_prompt_tokens: int = 0) -> "RemoteCache":
        """The cache of a session that somebody else opened and will close.

        It follows what happened to the session without it: steps of others, and a position set
        back, which also ends ``session.output_ids`` there.
        """
        cache: RemoteCache | None = getattr(session, "past_key_values", None)
        if cache is None:
            cache = cls(lambda num_rows, max_length: session, None, num_prompt_tokens)
            cache._session = session
            session.past_key_values = cache
        cache._follow(session)
        return cache

    def __enter__(self) -> "RemoteCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the session's memory on the servers. Further steps raise SessionClosed."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            session.close()

    # What a step needs

    @property
    def rows(self) -> Rows | None:
        """Rows and columns kept so far; None before the first step."""
        return self._rows and self._rows.behind(self._num_hidden)

    @property
    def num_columns(self) -> int:
        """Columns kept so far, prompts included."""
        return self._rows.num_columns if self._rows is not None else 0

    @contextmanager
    def shown_whole(self) -> Iterator[None]:
        """While the model's own forward runs, count the prompts as columns, too."""
        self._num_hidden = 0
        try:
            yield
        finally:
            self._num_hidden = self._num_prompt_tokens

    def read(self, num_rows: int, layout: ColumnLayout) -> Rows:
        """Check new columns against the kept ones. Raises BadInput, NotSupported, SessionClosed."""
        if self._closed:
            raise SessionClosed(
                "The session of these past_key_values is closed.",
                hint="Keep it open with `with model.inference_session(max_length=...) as session`.",
            )
        past = self._rows or Rows.empty(num_rows)
        if past.num_rows != num_rows:
            raise BadInput(
                f"The batch has {num_rows} rows, its session has {past.num_rows}.",
                hint="Use one session per batch; batch_select_indices changes the rows of a cache.",
            )
        return read_columns(past, layout)

    def step(self, hidden: Tensor, new: Rows) -> Tensor:
        """Run the new columns [rows, columns, H] behind the kept ones. An error changes nothing."""
        past = self._rows or Rows.empty(new.num_rows)
        if self._session is None:
            room = None if self.max_length is None else self.max_length + self._num_prompt_tokens
            self._session = self._open_session(new.num_rows, room)
        try:
            packed = self._session.step_rows(
                pack(hidden, new.real),
                starts=past.lengths,
                counts=new.lengths,
                reorder=self._origin,
            )
        finally:
            # A step that failed may have rolled back all the same; nobody else did.
            self._seen_position = self._session.position
        self._rows, self._origin = past.joined(new), None
        return unpack(packed, new.real)

    def reserve(self, max_length: int) -> None:
        """Ask for so many tokens per row when the session opens; an open session keeps its own."""
        if self.max_length is None:
            self.max_length = max_length

    def tell_position(self) -> None:
        """Show what was cropped here as the session's own position."""
        session: Any = self._session
        if session is not None and self._rows is not None:
            longest = max(self._rows.lengths)
            if session.position > longest:
                session.position = longest
            self._seen_position = session.position

    def _follow(self, session: Any) -> None:
        position = session.position
        if position == self._seen_position:
            return
        rows = self._rows or Rows.empty(max(1, len(session.lengths)))
        longest = rows.real.cumsum(1).amax(0)
        kept = rows.cut(int((longest <= position).sum()))
        if position < self._seen_position and session.output_ids is not None:
            num_kept = max(0, kept.num_columns - self._num_prompt_tokens)
            session.output_ids = session.output_ids[:, :num_kept]
        num_new = position - max(kept.lengths)
        first = kept.first.clamp(min=0)
        added = Rows(torch.ones(kept.num_rows, num_new, dtype=torch.bool), first)
        self._rows = kept.joined(added) if num_new else kept
        self._seen_position = position

    # What transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._rows.behind(self._num_hidden).num_columns if self._rows is not None else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length if self.max_length is not None else -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        return self._rows.num_rows if self._rows is not None else -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._rows is not None

    @property
    def is_croppable(self) -> bool:
        return True

    def activate_past_recording(self) -> None:
        """Servers can always roll back; there is nothing to switch on."""

    # What generation does to a cache

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; the count is negative or zero."""
        if tokens_to_remove > 0:
            raise BadInput(
                f"crop({tokens_to_remove}): the number of tokens to remove is given as negative.",
                hint="crop(-3) forgets the last three tokens.",
            )
        if self._rows is not None:
            self._rows = self._rows.cut(max(0, self._rows.num_columns + tokens_to_remove))

    def reset(self) -> None:
        """Forget everything; the session stays open."""
        self.crop(-self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """New row r continues old row ``beam_idx[r]``."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._rows is not None:
            self._select([row for row in range(self._rows.num_rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self._rows is None or rows == list(range(self._rows.num_rows)):
            return
        if not all(0 <= row < self._rows.num_rows for row in rows):
            raise BadInput(
                f"Rows {rows} are not all among the {self._rows.num_rows} rows of the session.",
                hint="Rows are counted from 0.",
            )
        origin = self._origin
        self._origin = rows if origin is None else [origin[row] for row in rows]
        self._rows = self._rows.select(rows)


class _RemoteLayer(CacheLayerMixin):
    """The one layer transformers sees, for code that looks into ``cache.layers``."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: RemoteCache) -> None:
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
