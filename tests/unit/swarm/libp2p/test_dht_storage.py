"""The storage for others' records: bounds, and what cannot be pushed out."""

import time

from hivemind.dht.routing import DHTID

from petals.swarm.libp2p import dht_storage
from petals.swarm.libp2p.dht_storage import BoundedStorage

KEY = DHTID.generate(source="key")
A_DAY = 86_400.0
SOON, LATER, LATEST = (time.time() + days * A_DAY for days in (1, 2, 3))
"""By the wall clock, since hivemind reads no other; none of them passes while the suite runs."""


def stored(storage: BoundedStorage, key: DHTID = KEY) -> dict[str, bytes]:
    held = storage.get(key)
    return {} if held is None else {subkey: v.value for subkey, v in held.value.items()}


def test_the_later_expiry_wins_and_an_earlier_one_does_not_shorten_it():
    storage = BoundedStorage(10_000)
    assert storage.store(KEY, b"new", LATER, subkey="a")
    assert not storage.store(KEY, b"old", SOON, subkey="a")
    values = storage.get(KEY).value
    assert values.expiration_heap[0].expiration_time == LATER
    assert storage.store(KEY, b"newest", LATEST, subkey="a")
    assert stored(storage) == {"a": b"newest"}
    assert storage.get(KEY).expiration_time == LATEST


def test_values_without_a_subkey_are_refused():
    storage = BoundedStorage(10_000)
    assert not storage.store(KEY, b"value", LATER)
    assert not stored(storage)


def test_a_full_storage_takes_renewals_but_nothing_new():
    storage = BoundedStorage(4000)
    names = [f"peer {i}" for i in range(50)]
    taken = [n for n in names if storage.store_subkey(KEY, n, bytes(100), LATER)]
    assert 3 <= len(taken) < 10
    assert taken == names[: len(taken)]
    assert storage.store_subkey(KEY, taken[0], bytes(100), LATEST)
    assert not storage.store_subkey(KEY, taken[0], bytes(3000), LATEST + 1)
    assert not storage.store_subkey(DHTID.generate(), "other", bytes(100), LATEST)
    assert set(stored(storage)) == set(taken)


def test_what_expired_makes_room(monkeypatch):
    monkeypatch.setattr(dht_storage, "_RECOUNT_AFTER", 2)
    storage = BoundedStorage(2000)
    assert storage.store_subkey(KEY, "a", bytes(800), SOON)
    other = DHTID.generate()
    assert not storage.store_subkey(other, "b", bytes(800), LATER)
    del storage[KEY]
    assert [storage.store_subkey(other, "b", bytes(800), LATER) for _ in range(2)] == [False, True]


def test_a_key_fits_into_one_answer(monkeypatch):
    monkeypatch.setattr(dht_storage, "MAX_KEY_BYTES", 5000)
    storage = BoundedStorage(10**6)
    taken = [storage.store_subkey(KEY, str(i), bytes(488), LATER) for i in range(6)]
    assert taken == [True] * 4 + [False] * 2
    assert storage.store_subkey(DHTID.generate(), "elsewhere", bytes(488), LATER)


def test_renewals_leave_nothing_behind():
    storage = BoundedStorage(10_000)
    for i in range(5000):
        assert storage.store_subkey(KEY, "a", b"value", LATER + i * 0.01)
    held = storage.get(KEY)
    assert len(storage.expiration_heap) < 100 and len(held.value.expiration_heap) < 100
    assert held.expiration_time == held.value.get("a").expiration_time
