"""Readers against a store that is a dictionary: what is read, how much, and what is kept."""

from collections import defaultdict
from collections.abc import Iterable

import pytest

from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord
from petals.swarm.directory.shard_reader import SAMPLE_SECONDS, Reading
from petals.types import ServerState

NOW = 1000.0


def crowd(size: int, bits: int | None = None, first: int = 0, **changes) -> list[ServerRecord]:
    fields = {"num_blocks": 4, "spans": ((0, 4),), "state": ServerState.ONLINE}
    fields |= {"shard_bits": records.shard_bits_for(size) if bits is None else bits}
    fields |= {"expires_at": NOW + 10_000}
    return [
        ServerRecord(peer_id=f"peer {number}", model="m", **(fields | changes))
        for number in range(first, first + size)
    ]


def stored(entries: Iterable[ServerRecord]) -> dict[str, list[ServerRecord]]:
    store: dict[str, list[ServerRecord]] = defaultdict(list)
    for entry in entries:
        for key in records.keys_to_store(entry):
            store[key].append(entry)
    return store


class Reader:
    """Fetches what a reading asks for, and counts it."""

    def __init__(self, store: dict[str, list[ServerRecord]], seed: int = 3) -> None:
        self.store, self.reading = store, Reading("m", seed)
        self.num_read = 0

    def fetch(self, keys: list[str], now: float) -> None:
        found = {key: self.store.get(key, []) for key in keys}
        self.num_read += sum(map(len, found.values()))
        self.reading.keep(found, now)

    def view(self, now: float) -> set[str]:
        self.fetch(self.reading.samples_due([0], now), now)
        self.fetch(self.reading.next_shards([0]), now)
        return self.peers(now)

    def peers(self, now: float) -> set[str]:
        return {record.peer_id for record in self.reading.known(now)}


def test_a_small_swarm_is_read_whole_each_time_and_nothing_is_kept():
    entries = crowd(20)
    reader = Reader(stored(entries))
    assert reader.view(NOW) == {entry.peer_id for entry in entries}
    reader.store = stored(entries[:5])
    assert reader.view(NOW) == {entry.peer_id for entry in entries[:5]}
    assert reader.reading.more(4, NOW) == []


def test_of_a_large_one_another_part_each_time():
    reader = Reader(stored(crowd(10_000)))
    first = reader.view(NOW)
    assert reader.num_read < 80
    second = reader.view(NOW + 60)
    assert reader.num_read < 110
    assert first < second
    assert 7_000 < reader.reading.population() < 13_000


def test_what_was_read_long_ago_is_dropped():
    reader = Reader(stored(crowd(10_000)))
    early = reader.view(NOW) - {entry.peer_id for entry in sample_of(reader)}
    for minute in range(1, 5):
        assert early <= reader.view(NOW + 60 * minute)
    assert not early & reader.view(NOW + records.KEPT_SECONDS + 1)


def sample_of(reader: Reader) -> list[ServerRecord]:
    return reader.store[records.block_key("m", 0, 0, 0)]


def test_the_sample_is_read_seldom():
    reader = Reader(stored(crowd(1000)))
    reader.view(NOW)
    assert reader.reading.samples_due([0], NOW + SAMPLE_SECONDS - 1) == []
    assert reader.reading.samples_due([0], NOW + SAMPLE_SECONDS) == [
        records.block_key("m", 0, 0, 0)
    ]


def test_different_readers_begin_at_different_shards():
    store = stored(crowd(1000))
    one, other = Reader(store, seed=1), Reader(store, seed=2)
    assert one.view(NOW) != other.view(NOW)


def test_all_shards_are_all_servers():
    entries = crowd(1000) + crowd(300, bits=7, first=1000)
    reader = Reader(stored(entries))
    reader.view(NOW)
    reader.fetch(reader.reading.all_shards([0]), NOW)
    assert reader.peers(NOW) == {entry.peer_id for entry in entries}


def test_while_a_population_grows_over_the_threshold_both_levels_are_read():
    entries = crowd(20, bits=0) + crowd(40, bits=1, first=20)
    reader = Reader(stored(entries))
    reader.view(NOW)
    reader.store = stored(entries[1:])
    assert "peer 0" not in reader.view(NOW + 1)
    assert reader.view(NOW + 2) == {entry.peer_id for entry in entries[1:]}


@pytest.mark.parametrize("state", [ServerState.ONLINE, ServerState.JOINING])
def test_where_holders_are_few_it_reads_on(state: ServerState):
    """Blocks 2:4 have servers in every eighth record only."""
    many = crowd(400, bits=5, spans=((0, 2),))
    few = crowd(50, bits=5, first=400, spans=((2, 4),), state=state)
    reader = Reader(stored(many + few))
    reader.view(NOW)
    for _ in range(40):
        more = reader.reading.more(4, NOW)
        if not more:
            break
        reader.fetch(more, NOW)
    holders = [r for r in reader.reading.known(NOW) if r.holds(2)]
    if state is ServerState.ONLINE:
        assert len(holders) >= 3 and reader.num_read < 200
    else:
        assert len({r.peer_id for r in holders}) == 50


def test_a_swarm_that_shrank_is_found_again_by_its_sample():
    reader = Reader(stored(crowd(1000)))
    reader.view(NOW)
    left = crowd(10)
    reader.store = stored(left)
    later = NOW + records.KEPT_SECONDS + 1
    assert not reader.view(later) - {f"peer {number}" for number in range(1000)}
    for _ in range(4):
        reader.fetch(reader.reading.more(4, later), later)
    assert reader.peers(later) == {entry.peer_id for entry in left}


def test_keys_tell_bucket_and_level():
    key = records.block_key("an/odd/name", 7, 5, 31)
    assert records.bucket_and_level(key) == (7, 5)
