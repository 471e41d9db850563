"""Announce servers, and read views of them.

Connects the pure ``records`` with the engine's record store: seals and stores, fetches and merges.
Records are checked again when they are read, since another peer stored them. Must not know routing
and placement.
"""

import asyncio
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType

import msgspec

from petals.clock import Clock
from petals.errors import RecordInvalid
from petals.logs import get_logger
from petals.swarm.address import Address
from petals.swarm.background import gather_bounded
from petals.swarm.directory import records
from petals.swarm.directory.records import ModelRecord, ModelSummary, R, ServerRecord, View
from petals.swarm.directory.shard_reader import SAMPLE_SECONDS, Reading
from petals.swarm.identity import Identity
from petals.swarm.transport import StoredValue, Transport
from petals.types import ModelId, PeerId, ServerState

logger = get_logger(__name__)

MAX_SKEW_SECONDS = 3.0
"""A difference of clocks (s) that is reported: it shortens or prolongs the life of records."""

MORE_SHARDS = 4
"""Further shards that one view reads at most, where a block has few servers."""

_STAYING = (ServerState.JOINING, ServerState.ONLINE)
_MAX_ADDRESSES = 8
"""Addresses in one record."""

_MAX_RECORDS_PER_KEY = 2000
"""Records of one key that are looked at; a peer may store any number."""

_STORED_AT_ONCE = 16
"""Keys that are stored at the same time; a model of 4096 blocks has 256."""

_RECORDS_AT_ONCE = 32
"""Signatures that are checked before other tasks may run."""


class Directory:
    """The servers of the swarm, as their records describe them."""

    def __init__(self, transport: Transport, identity: Identity, clock: Clock) -> None:
        self._transport = transport
        self._store = transport.records
        self._identity = identity
        self._clock = clock
        self._own: dict[str, tuple[ServerRecord, str]] = {}
        self._readings: dict[str, Reading] = {}
        self._population: dict[str, tuple[float, int]] = {}
        self._skews: dict[PeerId, float] = {}

    async def announce(self, record: ServerRecord, repository: str = "") -> bool:
        """Sign and store this peer's record until ``record.expires_at``; True if at least one key
        was stored.

        ``peer_id``, ``addresses`` and ``shard_bits`` are filled in. A record that should replace an
        earlier one (OFFLINE, too) is made to expire later than it: the later expiry wins. Spans
        that were announced before and are no longer served are withdrawn in the same call. In a
        swarm of many shards a record lives at least as long as readers keep it.
        """
        previous = self._own.get(record.model)
        shard_bits = records.shard_bits_for(await self._population_of(record))
        expires_at = record.expires_at
        if shard_bits and record.state in _STAYING:
            expires_at = max(expires_at, self._clock.now() + records.KEPT_SECONDS)
        if previous is not None:
            expires_at = max(expires_at, previous[0].expires_at + 0.01)
        addresses = record.addresses or _to_announce(await self._transport.addresses())
        record = msgspec.structs.replace(
            record,
            peer_id=self._identity.peer_id,
            addresses=addresses,
            relayed=any(Address(address).is_relayed for address in addresses),
            expires_at=expires_at,
            shard_bits=shard_bits,
        )
        keys = set(records.keys_to_store(record))
        if previous is not None:
            keys.update(records.keys_to_store(previous[0]))
        if record.state is ServerState.OFFLINE:
            self._own.pop(record.model, None)
        else:
            self._own[record.model] = (record, repository)
        stored = await self._store_all(sorted(keys), record)
        if records.is_sample(record) and record.state is not ServerState.OFFLINE:
            await self._announce_model(record, repository)
        return stored

    async def store_again(self) -> None:
        """Store this peer's current records once more, after the engine has lost its storage."""
        for record, repository in list(self._own.values()):
            if record.expires_at > self._clock.now():
                await self.announce(record, repository)

    async def view(self, model: str, num_blocks: int | None = None, whole: bool = False) -> View:
        """A picture of the model's servers now.

        ``num_blocks`` None asks the models list (0 blocks if no server has the model). In large
        swarms a part of the servers is read, another one each time, unless ``whole``; what was read
        in the last five minutes is in the view, too. See ``reading``.
        """
        if num_blocks is None:
            found = [m for m in await self.models() if m.model == model]
            num_blocks = found[0].num_blocks if found else 0
        num_blocks = max(0, min(num_blocks, 4096))
        reading = self._reading(model)
        buckets = range(-(-num_blocks // records.BLOCKS_PER_BUCKET))
        now = self._clock.now()
        reading.keep(await self._fetch(reading.samples_due(buckets, now)), now)
        further = reading.all_shards(buckets) if whole else reading.next_shards(buckets)
        reading.keep(await self._fetch(further), now)
        for _ in range(0 if whole else MORE_SHARDS):
            more = reading.more(num_blocks, now)
            if not more:
                break
            reading.keep(await self._fetch(more), now)
        self._population[model] = (now, reading.population())
        now = self._clock.now()
        merged = records.merge(reading.known(now), model, now)
        for peer, record in merged.items():
            self._transport.learn(peer, record.addresses)
        return View(ModelId(model), num_blocks, MappingProxyType(merged), now)

    async def models(self) -> tuple[ModelSummary, ...]:
        """The models that are announced."""
        values = (await self._store.get([records.MODELS_KEY]))[records.MODELS_KEY]
        return records.summarize(await self._sound(values, ModelRecord), self._clock.now())

    def note_skew(self, peer: PeerId, skew_seconds: float) -> None:
        """Record how far (s) a peer's clock is ahead; warn once per peer beyond
        ``MAX_SKEW_SECONDS``.
        """
        known = self._skews.get(peer, 0.0)
        self._skews[peer] = skew_seconds
        if abs(skew_seconds) > MAX_SKEW_SECONDS >= abs(known):
            logger.warning(
                "the clock of peer %s differs from ours by %.1f s; set both by NTP",
                peer,
                skew_seconds,
            )

    def _reading(self, model: str) -> Reading:
        seed = zlib.crc32(self._identity.peer_id.encode())
        return self._readings.setdefault(model, Reading(model, seed))

    async def _population_of(self, record: ServerRecord) -> int:
        """How many servers a bucket of the model has, read again every ``SAMPLE_SECONDS`` while the
        server stays.
        """
        read_at, population = self._population.get(record.model, (-math.inf, 0))
        if record.state in _STAYING and self._clock.now() - read_at > SAMPLE_SECONDS:
            await self.view(record.model, record.num_blocks)
            _, population = self._population[record.model]
        return population

    async def _announce_model(self, record: ServerRecord, repository: str) -> None:
        entry = ModelRecord(
            peer_id=record.peer_id,
            model=record.model,
            num_blocks=record.num_blocks,
            expires_at=record.expires_at,
            repository=repository,
        )
        subkey = f"{record.model}/{record.peer_id}"
        value = records.seal(entry, self._identity)
        await self._store.store(records.MODELS_KEY, subkey, value, record.expires_at)

    async def _store_all(self, keys: Iterable[str], record: ServerRecord) -> bool:
        value = records.seal(record, self._identity)
        store = partial(
            self._store.store,
            subkey=record.peer_id,
            value=value,
            expires_at=record.expires_at,
        )
        return any(await gather_bounded([partial(store, key) for key in keys], _STORED_AT_ONCE))

    async def _fetch(self, keys: Sequence[str]) -> Mapping[str, list[ServerRecord]]:
        if not keys:
            return {}
        stored = await self._store.get(keys)
        return {key: await self._sound(stored[key], ServerRecord) for key in keys}

    async def _sound(self, values: Mapping[str, StoredValue], kind: type[R]) -> list[R]:
        found: list[R] = []
        for number, (subkey, value) in enumerate(islice(values.items(), _MAX_RECORDS_PER_KEY)):
            if number % _RECORDS_AT_ONCE == _RECORDS_AT_ONCE - 1:
                await asyncio.sleep(0)
            try:
                records.check_stored(subkey, value.value, value.expires_at, self._clock.now())
                found.append(records.unseal(value.value, kind))
            except RecordInvalid as error:
                logger.debug("ignored a record of %s: %s", subkey, error)
        return found


def _to_announce(addresses: Sequence[str]) -> tuple[str, ...]:
    """Relayed addresses first; those of this machine alone only if there are no others."""
    known = [Address(text) for text in addresses]
    others = [address for address in known if not address.is_loopback]
    ordered = sorted(others or known, key=lambda address: not address.is_relayed)
    return tuple(str(address) for address in ordered[:_MAX_ADDRESSES])
