"""A session as transformers sees it: a cache whose keys and values stay on the servers.

A cache holds server memory only while it has a session. Before, and while it is parked, it is a
recording of the inputs of the first block, from which a session is begun when the cache is
continued. So a cache that is never continued costs no server anything. Knows no model and no text.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from petals.client.model.inference_session import InferenceSession, Recording
from petals.client.model.padding import Rows
from petals.errors import BadInput, NotSupported, SessionClosed
from petals.models.checkpoint.arch import CACHE_ARGUMENT

SessionOpener = Callable[[int | None], InferenceSession]
"""Opens a session for rows of at most this many tokens; None: it grows with its steps."""


def name_cache(call: dict[str, Any]) -> dict[str, Any]:
    """``call``, the arguments by name, with the name for a cache that the installed transformers
    has.
    """
    if CACHE_ARGUMENT != "past_key_values" and "past_key_values" in call:
        call[CACHE_ARGUMENT] = call.pop("past_key_values")
    return call


class SessionCache(Cache):
    """A session as ``past_key_values``: a full `Cache`, so that `generate` works in all its modes.

    ``open_session`` is called by ``open``; without it, the model that is given the cache first
    brings its own (``bind``). ``grows``: the session takes memory as its rows grow, whatever length
    is asked for at its opening. Leaving the context, or dropping the cache, frees the session.
    ``copy.deepcopy`` forks the session; a pickle holds the recording. Sequences of a tuned model
    begin with trained prompts, which only its own forward sees (``shown_whole``): for all other
    code column 0 is the first one after the prompts.
    """

    def __init__(
        self,
        open_session: SessionOpener | None = None,
        recording: Recording | None = None,
        *,
        grows: bool = True,
    ) -> None:
        super().__init__(layers=[_SessionLayer(self)])
        self._open_session = open_session
        self._recording = recording
        self._grows = grows
        self._session: InferenceSession | None = None
        self._is_closed = False
        self._shows_prompts = False

    @classmethod
    def of(cls, session: InferenceSession) -> "SessionCache":
        """The cache of a session that its owner opened and will close; always the same object."""
        if session.past_key_values is None:
            cache = cls()
            cache._session = session
            session.past_key_values = cache
        found: SessionCache = session.past_key_values
        return found

    @classmethod
    def adopted(cls, given: Cache, open_session: SessionOpener) -> "SessionCache":
        """``given`` as a cache of ours: an empty one of transformers becomes one, the same object,
        so that its owner can pass it again. Raises NotSupported for any other cache.
        """
        if isinstance(given, SessionCache):
            given._open_session = given._open_session or open_session
            return given
        if type(given).__module__ != Cache.__module__ or not _is_empty(given):
            raise NotSupported(
                f"This {type(given).__name__} holds keys and values here, or may hold them, "
                "but those of remote blocks stay on the servers.",
                hint="Pass a new DynamicCache(), call the model with use_cache=True and pass on "
                "what it returns, or work inside `with model.inference_session(max_length=...)`.",
            )
        given.__dict__.clear()
        given.__class__ = cls
        adopted: SessionCache = given
        adopted.__init__(open_session)  # type: ignore[misc]
        return adopted

    def __enter__(self) -> "SessionCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._session is not None:
            self.close()

    def __deepcopy__(self, memo: dict[int, object]) -> "SessionCache":
        twin = SessionCache(self._open_session, self._recording)
        twin._is_closed = self._is_closed
        if self._session is not None:
            twin._session = self._session.fork()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        recording = self._recording if self._session is None else self._session.recorded()
        if recording is None and self.columns.num_columns:
            raise NotSupported(
                "The cache cannot be pickled: its inputs did not fit into max_kept_bytes.",
                hint="Pickle the token ids, or set outputs.past_key_values = None before.",
            )
        return SessionCache, (None, recording), {"_is_closed": self._is_closed}

    @property
    def is_open(self) -> bool:
        """Whether there is a session, which holds memory of servers."""
        return self._session is not None

    def open(self, max_length: int | None = None) -> InferenceSession:
        """The session. If there is none, one is opened for ``max_length`` tokens per row, unless
        the cache grows, and runs what was recorded.

        Raises SessionClosed and the errors of a step; the cache is then as it was.
        """
        if self._session is not None:
            return self._session
        if self._is_closed or self._open_session is None:
            raise SessionClosed(
                "The session of these past_key_values is closed.",
                hint="Keep it open with `with model.inference_session(max_length=...) as session`.",
            )
        session, recording = self._open_session(None if self._grows else max_length), None
        recording = self._recording
        if recording is not None and recording.columns.num_columns:
            try:
                session.step_columns(recording.hidden, recording.columns, recording.rope_lengths)
            except BaseException:
                session.close()
                raise
        self._session, self._recording = session, None
        return session

    def record(self, recording: Recording) -> None:
        """Whole sequences have run for a cache without a session; it can go on from them."""
        self._recording = recording

    def park(self) -> None:
        """Free the session's memory on the servers and keep a recording, from which the cache can
        go on. A session whose inputs were not kept stays open until the cache is dropped.
        """
        session, recording = self._session, None
        if session is None:
            return
        if self.columns.num_columns:
            recording = session.recorded()
            if recording is None:
                return
        self._session, self._recording, self._grows = None, recording, True
        session.close()

    def close(self) -> None:
        """Free the session's memory on the servers. Further steps raise SessionClosed."""
        session, self._session, self._recording = self._session, None, None
        self._is_closed = True
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
        """All columns, prompts included; no rows before the first ones."""
        if self._session is not None:
            return self._session.columns
        return Rows.empty(0) if self._recording is None else self._recording.columns

    @property
    def longest_since_empty(self) -> tuple[int, ...]:
        """Most tokens that each row has had since it was empty, prompts included."""
        if self._session is not None:
            return self._session.longest_since_empty(self.columns)
        return () if self._recording is None else self._recording.longest_since_empty

    @property
    def visible(self) -> Rows:
        """The columns that the caller may know of at present."""
        return self.columns.behind(self._num_hidden)

    @property
    def _num_hidden(self) -> int:
        source = self._recording if self._session is None else self._session
        return 0 if source is None or self._shows_prompts else source.num_prompt_tokens

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
        num_kept = max(0, self.columns.num_columns + tokens_to_remove)
        if self._session is not None:
            self._session.columns = self.columns.cut(num_kept)
        elif self._recording is not None:
            self._recording = self._recording.cut(num_kept)

    def reset(self) -> None:
        """Remove all columns; the session stays open."""
        self.crop(-self.get_seq_length())

    def begin_anew(self) -> None:
        """Remove all columns, also those of trained prompts; the next step runs them again."""
        self.crop(-self.columns.num_columns)

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
        elif self._recording is not None:
            self._recording = self._recording.select(rows)


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


def _is_empty(cache: Cache) -> bool:
    """Whether no layer of a cache of transformers holds any token."""
    for layer in getattr(cache, "layers", [None]):
        states = getattr(layer, "has_previous_state", False)
        has_states = any(states.values()) if isinstance(states, dict) else bool(states)
        has_tokens = isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0
        if layer is None or has_states or has_tokens:
            return False
    return True
