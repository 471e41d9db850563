"""The records that one peer keeps for the directory, within bounds that no peer can exceed.

hivemind's storage lets an older value shorten the life of a newer one, and evicts values to make
room for new ones; here both are refused. Must not know the content of records, calls and peers.
"""

import heapq
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue

MAX_KEY_BYTES = 1024 * 1024
"""All values of a key travel in one answer, which hivemind bounds to 4 MiB."""

_ENTRY_BYTES = 512
"""Estimated memory of a value beside its bytes, and of a key beside its values."""

_RECOUNT_AFTER = 1000
"""Refusals after which the bytes are counted again."""


class BoundedStorage(DHTLocalStorage):
    """Values by key and subkey until they expire, up to ``max_bytes``; a full storage takes
    renewals that are no longer, and nothing new.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_refused = 0

    def store(
        self, key: DHTID, value: Any, expiration_time: float, subkey: str | None = None
    ) -> bool:
        """True if the value was stored. Values without a subkey are refused: records have one."""
        if subkey is not None:
            return self.store_subkey(key, subkey, value, expiration_time)
        if not isinstance(value, DictionaryDHTValue):
            return False
        return bool(super().store(key, value, expiration_time))

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """True if the value was stored: it expires later than the one before, and it fits."""
        held = self.get(key)
        values = None if held is None else held.value
        known = None if values is None else values.get(subkey)
        if known is not None and known.expiration_time >= expiration_time:
            return False
        growth = len(value) - len(known.value) if known else len(value) + _ENTRY_BYTES
        if growth > 0 and not self._has_room(values, growth):
            return False
        stored = bool(super().store_subkey(key, subkey, value, expiration_time))
        if stored:
            self._num_bytes += growth
        for storage in (self, values):
            if storage is not None:
                _prune_heap(storage)
        return stored

    def _has_room(self, values: DictionaryDHTValue | None, growth: int) -> bool:
        if values is not None and _size_of(values) + growth > MAX_KEY_BYTES:
            return False
        if self._num_bytes + growth <= self._max_bytes:
            return True
        # Expired values are not subtracted when they are removed: count again, but not at every
        # refusal.
        self._num_refused += 1
        if self._num_refused % _RECOUNT_AFTER == 1:
            self._num_bytes = sum(_size_of(held.value) for _, held in self.items())
        return self._num_bytes + growth <= self._max_bytes


def _size_of(values: DictionaryDHTValue) -> int:
    return _ENTRY_BYTES + sum(len(held.value) + _ENTRY_BYTES for _, held in values.items())


def _prune_heap(storage: Any) -> None:
    """Every renewal leaves an old entry in the heap of expiries; remove them before they grow."""
    if len(storage.expiration_heap) > 64 + 4 * len(storage.data):
        storage.expiration_heap = list(storage.key_to_heap.values())
        heapq.heapify(storage.expiration_heap)
