"""A session as a cache of transformers: keys and values stay on the servers.

A full `Cache`, so that `generate` works on it in all its modes. Which columns there are is read
from the session; cropping, reordering and repeating are passed to the session, which sends them
with its next step. Knows no network.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from petals.client.model.inference_session import InferenceSession
from petals.client.model.padding import Rows
from petals.errors import BadInput, NotSupported, SessionClosed


class SessionCache(Cache):
    """``past_key_values`` of a model with remote blocks.

    ``open_session(max_length)`` is called once, by ``open``. Closing the cache (a context manager)
    closes the session. Sequences of a tuned model begin with trained prompts, which only its own
    forward sees (``shown_whole``): for all other code column 0 is the first one after the prompts.
    """

    def __init__(self, open_session: Callable[[int | None], InferenceSession]) -> None:
        super().__init__(layers=[_SessionLayer(self)])
        self.seen_ids: Tensor | None = None
        """[rows, columns] int64: the ids from which `generate` prepared its latest forward."""
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
