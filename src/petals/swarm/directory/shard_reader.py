"""What one peer has read of a model's servers, and which part of the directory it reads next.

A small swarm is one shard per bucket, read whole each time. Of a large one a reader takes one shard
per bucket and view, the next one each time, keeps it for ``records.KEPT_SECONDS``, and reads every
``SAMPLE_SECONDS`` the sample from which the level of sharding follows. Pure. Must not know clock
and store.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from petals.swarm.directory import records
from petals.swarm.directory.records import ServerRecord
from petals.types import ServerState

SAMPLE_SECONDS = 600.0
"""Age at which the level-0 sample of a bucket is read again to learn the level of sharding."""

ENOUGH_HOLDERS = 3
"""A block with fewer ONLINE servers than this has the next shard of its bucket read at once."""

_LEVELS_FOLLOWED = 2
"""Levels of sharding that are read: while a population crosses a threshold, it is at two."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One key's records, as read at ``read_at`` (seconds since the epoch)."""

    read_at: float
    records: Sequence[ServerRecord]


@dataclass(slots=True)
class _Bucket:
    """The keys of one bucket: the sample, the levels found in it, and the number of shards read."""

    sample: _Part | None = None
    levels: tuple[int, ...] = ()
    turn: int = 0
    shards: dict[str, _Part] = field(default_factory=dict)


class Reading:
    """One model's directory entries, as far as they have been read.

    ``seed`` lets different readers begin at different shards. Times are seconds since the epoch.
    """

    def __init__(self, model: str, seed: int) -> None:
        self.model = model
        self._seed = seed
        self._buckets: dict[int, _Bucket] = {}

    def samples_due(self, buckets: Iterable[int], now: float) -> list[str]:
        """The level-0 keys to read now: where servers are found there, or the level may be old."""
        due = []
        for number in buckets:
            sample, levels = self._bucket(number).sample, self._bucket(number).levels
            is_fresh = sample is not None and now - sample.read_at < SAMPLE_SECONDS
            if not is_fresh or 0 in levels or not levels:
                due.append(self._sample_key(number))
        return due

    def next_shards(self, buckets: Iterable[int]) -> list[str]:
        """One further shard of each bucket and level; none where the sample holds all servers."""
        keys = []
        for number in buckets:
            bucket = self._bucket(number)
            for bits in filter(None, bucket.levels[:_LEVELS_FOLLOWED]):
                shard = (self._seed + bucket.turn) % (1 << bits)
                keys.append(records.block_key(self.model, number, bits, shard))
            bucket.turn += 1
        return keys

    def all_shards(self, buckets: Iterable[int]) -> list[str]:
        """Every shard at every level in use."""
        return [
            records.block_key(self.model, number, bits, shard)
            for number in buckets
            for bits in filter(None, self._bucket(number).levels)
            for shard in range(1 << bits)
        ]

    def more(self, num_blocks: int, now: float) -> list[str]:
        """What to read beside what was read at ``now``: further shards where holders are few.

        The level may have changed, so their samples are among it. Empty when all has been read.
        """
        online = [r for r in self.known(now) if r.state is ServerState.ONLINE]
        counts = [0] * (num_blocks + 1)
        for record in online:
            for start, end in record.spans:
                counts[min(start, num_blocks)] += 1
                counts[min(end, num_blocks)] -= 1
        held, thin = 0, dict[int, None]()
        for block in range(num_blocks):
            held += counts[block]
            if held < ENOUGH_HOLDERS:
                thin[block // records.BLOCKS_PER_BUCKET] = None
        keys = [self._sample_key(number) for number in thin] + self.next_shards(thin)
        return [key for key in keys if self._age(key, now) > 0]

    def keep(self, parts: Mapping[str, Sequence[ServerRecord]], now: float) -> None:
        """Remember what keys held at ``now``, instead of what they held before."""
        for key, found in parts.items():
            number, bits = records.bucket_and_level(key)
            bucket = self._bucket(number)
            if bits:
                bucket.shards[key] = _Part(now, found)
                continue
            bucket.sample = _Part(now, found)
            levels = Counter(record.shard_bits for record in found).most_common()
            bucket.levels = tuple(bits for bits, _ in levels)

    def known(self, now: float) -> list[ServerRecord]:
        """All that was read and is not too old; those that others have replaced are among it."""
        found: list[ServerRecord] = []
        for bucket in self._buckets.values():
            bucket.shards = {k: p for k, p in bucket.shards.items() if _is_kept(p, now)}
            for part in (bucket.sample, *bucket.shards.values()):
                if part is not None and _is_kept(part, now):
                    found += part.records
        return found

    def population(self) -> int:
        """Estimate of all servers of the fullest bucket."""
        samples = [bucket.sample for bucket in self._buckets.values() if bucket.sample]
        return max((records.population_of(sample.records) for sample in samples), default=0)

    def _bucket(self, number: int) -> _Bucket:
        return self._buckets.setdefault(number, _Bucket())

    def _sample_key(self, number: int) -> str:
        return records.block_key(self.model, number, 0, 0)

    def _age(self, key: str, now: float) -> float:
        number, bits = records.bucket_and_level(key)
        bucket = self._bucket(number)
        part = bucket.shards.get(key) if bits else bucket.sample
        return float("inf") if part is None else now - part.read_at


def _is_kept(part: _Part, now: float) -> bool:
    return now - part.read_at <= records.KEPT_SECONDS
