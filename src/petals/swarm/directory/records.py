"""The directory's entries: what a server announces about itself, signed, bounded and expiring.

A stored value is an envelope: kind, public key, payload, signature. The peer id follows from the
public key, so no peer can make a record of another. Keys are (model, bucket of blocks, shard); the
number of shards (2^bits) follows the population, and a sample of every population stays under shard
level 0, from which readers learn the level in use. Pure. Must not know a clock, sockets and torch.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from petals.errors import RecordInvalid
from petals.swarm.identity import Identity, peer_id_of, verify
from petals.types import BlockSpan, ModelId, PeerId, ServerState

MAX_VALUE_BYTES = 4096
"""Longest sealed record."""

MAX_LIFETIME_SECONDS = 3600.0
"""No record may outlive this; it also bounds what a wrong clock can do."""

MODELS_KEY = "petals/models"
"""Key of all model records."""

BLOCKS_PER_BUCKET = 16
"""Consecutive blocks whose servers share a key."""

RECORDS_PER_SHARD = 24
"""Most records of a shard, on average; more make a further level of sharding."""

KEPT_SECONDS = 300.0
"""Time (s) that readers keep a shard of a large swarm, and least lifetime of its records."""

MAX_SHARD_BITS = 10
"""Highest level of sharding: 1024 shards a bucket."""

_MAX_BLOCKS = 4096
"""Most blocks of a model."""

_LABEL = b"petals record 1\0"

RecordName = Annotated[str, Meta(max_length=256)]
RecordCount = Annotated[int, Meta(ge=0, le=2**53)]
Block = Annotated[int, Meta(ge=0, le=_MAX_BLOCKS)]
Rate = Annotated[float, Meta(ge=0, le=1e12)]
BlockRange = tuple[Block, Block]


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one server serves of one model.

    ``throughput`` and ``inference_rps`` are rates in blocks x tokens/s, as measured by the server:
    in full batches, and of one session that decodes. ``max_length`` and ``cache_tokens`` count
    tokens; times are seconds since the epoch. ``next_spans``: where a DRAINING server that moves
    will be; empty if it leaves for good. ``trains``: it computes gradients. Fields that this
    version does not know are ignored, so that versions can share a directory.
    """

    peer_id: RecordName
    model: RecordName
    num_blocks: Block
    spans: Annotated[tuple[BlockRange, ...], Meta(max_length=16)]
    state: ServerState
    expires_at: float
    throughput: Rate = 0.0
    inference_rps: Rate | None = None
    dtype: RecordName = "float32"
    quant: RecordName | None = None
    adapters: Annotated[tuple[RecordName, ...], Meta(max_length=32)] = ()
    max_length: RecordCount = 0
    cache_tokens: RecordCount = 0
    version: RecordName = ""
    protocol_version: RecordCount = 0
    public_name: Annotated[str, Meta(max_length=64)] | None = None
    relayed: bool = False
    trains: bool = False
    addresses: Annotated[tuple[RecordName, ...], Meta(max_length=8)] = ()
    shard_bits: Annotated[int, Meta(ge=0, le=MAX_SHARD_BITS)] = 0
    next_spans: Annotated[tuple[BlockRange, ...], Meta(max_length=16)] = ()

    @property
    def block_spans(self) -> tuple[BlockSpan, ...]:
        """The spans as values; empty ones are never in a decoded record."""
        return tuple(BlockSpan(start, end) for start, end in self.spans)

    def holds(self, block: int) -> bool:
        """True if one of the spans has this block, whatever the state."""
        return any(start <= block < end for start, end in self.spans)


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One server's statement that it serves a model."""

    peer_id: RecordName
    model: RecordName
    num_blocks: Block
    expires_at: float
    repository: RecordName = ""


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    kind: Annotated[str, Meta(max_length=16)]
    public_key: Annotated[bytes, Meta(max_length=1200)]
    payload: Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)]
    signature: Annotated[bytes, Meta(max_length=1024)]


AnyRecord = ServerRecord | ModelRecord
R = TypeVar("R", ServerRecord, ModelRecord)

_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(_Envelope)
_KINDS: dict[type[AnyRecord], str] = {ServerRecord: "server", ModelRecord: "model"}
_DECODERS = {kind: msgspec.msgpack.Decoder(record) for record, kind in _KINDS.items()}


def seal(record: AnyRecord, identity: Identity) -> bytes:
    """The signed value to store. Raises RecordInvalid if the record is too large to be accepted."""
    kind, payload = _KINDS[type(record)], _encoder.encode(record)
    signature = identity.sign(_signed_bytes(kind, payload))
    value = _encoder.encode(_Envelope(kind, identity.public_key, payload, signature))
    if len(value) > MAX_VALUE_BYTES:
        raise RecordInvalid(f"A record of {len(value)} bytes is longer than {MAX_VALUE_BYTES}.")
    return value


def unseal(value: bytes, kind: type[R]) -> R:
    """A stored value -> the record in it, its signature checked, its expiry not. Raises
    RecordInvalid.
    """
    record = _open(value)
    if not isinstance(record, kind):
        raise RecordInvalid(f"Expected a {_KINDS[kind]} record.")
    return record


def check_stored(subkey: str, value: bytes, expires_at: float, now: float) -> None:
    """Whether a peer may keep ``value`` for others. Raises RecordInvalid.

    It must be a sound record of the peer named by ``subkey`` (its last part, after ``/``), expire
    when it says, and not too late.
    """
    record = _open(value)
    if record.peer_id != subkey.rsplit("/", 1)[-1]:
        raise RecordInvalid("The record belongs to another peer.")
    if abs(record.expires_at - expires_at) > 1e-3:
        raise RecordInvalid("The record's expiry is not the one it is stored with.")
    if not now < expires_at <= now + MAX_LIFETIME_SECONDS:
        raise RecordInvalid("The record's expiry is out of bounds.")


@lru_cache(maxsize=4096)
def _open(value: bytes) -> AnyRecord:
    """Cached: the same few values are read again and again, and a signature costs 0.2 ms."""
    if len(value) > MAX_VALUE_BYTES:
        raise RecordInvalid("The record is too long.")
    try:
        envelope = _envelopes.decode(value)
        decoder = _DECODERS.get(envelope.kind)
        if decoder is None:
            raise RecordInvalid(f"Records of kind {envelope.kind!r} are unknown.")
        record: AnyRecord = decoder.decode(envelope.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordInvalid(f"A record could not be read: {error}") from error
    signed = _signed_bytes(envelope.kind, envelope.payload)
    if peer_id_of(envelope.public_key) != record.peer_id or not verify(
        envelope.public_key, signed, envelope.signature
    ):
        raise RecordInvalid("The record is not signed by the peer it names.")
    _check_values(record)
    return record


def _check_values(record: AnyRecord) -> None:
    if not math.isfinite(record.expires_at):
        raise RecordInvalid("The record's expiry is not a time.")
    for text in _texts_of(record):
        if not text.isprintable():
            raise RecordInvalid("A name in the record has characters that cannot be shown.")
    if isinstance(record, ServerRecord):
        for start, end in record.spans + record.next_spans:
            if not start < end <= record.num_blocks:
                raise RecordInvalid(f"Blocks {start}:{end} are not a span of the model.")


def _texts_of(record: AnyRecord) -> Iterator[str]:
    """Texts that are shown on terminals, which obey control characters."""
    for value in msgspec.structs.astuple(record):
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from (part for part in value if isinstance(part, str))


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    return _LABEL + kind.encode() + b"\0" + payload


# -- keys ------------------------------------------------------------------------------------------


def shard_bits_for(population: int, per_shard: int = RECORDS_PER_SHARD) -> int:
    """Level of sharding at which a shard holds half of to all of ``per_shard`` records."""
    if population <= per_shard:
        return 0
    return min(MAX_SHARD_BITS, math.ceil(math.log2(population / per_shard)))


def shard_of(peer: str, bits: int) -> int:
    """The peer's shard at a level, spread by hash."""
    return int.from_bytes(hashlib.sha256(peer.encode()).digest()[:4], "big") & ((1 << bits) - 1)


def block_key(model: str, bucket: int, bits: int, shard: int) -> str:
    """Name of one shard of one bucket of blocks in the record store."""
    return f"petals/blocks/{model}/{bucket}/{bits}/{shard}"


def bucket_and_level(key: str) -> tuple[int, int]:
    """Bucket and level of sharding of a key that ``block_key`` made."""
    _, bucket, bits, _ = key.rsplit("/", 3)
    return int(bucket), int(bits)


def buckets_of(spans: Iterable[BlockSpan]) -> tuple[int, ...]:
    """The buckets that these spans touch."""
    touched: set[int] = set()
    for span in spans:
        if len(span):
            touched.update(
                range(span.start // BLOCKS_PER_BUCKET, (span.end - 1) // BLOCKS_PER_BUCKET + 1)
            )
    return tuple(sorted(touched))


def keys_to_store(record: ServerRecord) -> tuple[str, ...]:
    """Every key this record belongs under: its shard of each bucket, and the level-0 sample if it
    is in it.
    """
    keys = []
    shard = shard_of(record.peer_id, record.shard_bits)
    for bucket in buckets_of(record.block_spans):
        keys.append(block_key(record.model, bucket, record.shard_bits, shard))
        if record.shard_bits and is_sample(record):
            keys.append(block_key(record.model, bucket, 0, 0))
    return tuple(keys)


def is_sample(record: ServerRecord) -> bool:
    """True for the one in 2**bits records that readers find without knowing the level."""
    return shard_of(record.peer_id, record.shard_bits) == 0


def population_of(sample: Iterable[ServerRecord]) -> int:
    """Estimate of all records of a bucket from its level-0 sample."""
    return sum(1 << record.shard_bits for record in sample)


# -- views -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """An immutable picture of the servers of one model, taken at ``taken_at`` (seconds since the
    epoch).
    """

    model: ModelId
    num_blocks: int
    records: Mapping[PeerId, ServerRecord]
    taken_at: float

    @cached_property
    def _by_block(self) -> tuple[tuple[ServerRecord, ...], ...]:
        holders: list[list[ServerRecord]] = [[] for _ in range(self.num_blocks)]
        for record in self.records.values():
            if record.state is ServerState.ONLINE:
                for start, end in record.spans:
                    for block in range(start, min(end, self.num_blocks)):
                        holders[block].append(record)
        return tuple(tuple(found) for found in holders)

    def holders(self, block: int) -> tuple[ServerRecord, ...]:
        """The ONLINE servers of one block."""
        return self._by_block[block] if 0 <= block < self.num_blocks else ()

    def coverage(self) -> tuple[int, ...]:
        """How many ONLINE servers each block has."""
        return tuple(len(found) for found in self._by_block)

    def missing(self, blocks: BlockSpan | None = None) -> tuple[BlockSpan, ...]:
        """Spans of blocks (of ``blocks``, or of the model) that no ONLINE server has."""
        wanted = blocks or BlockSpan(0, self.num_blocks)
        gaps: list[BlockSpan] = []
        for block in range(wanted.start, wanted.end):
            if self.holders(block):
                continue
            if gaps and gaps[-1].end == block:
                gaps[-1] = BlockSpan(gaps[-1].start, block + 1)
            else:
                gaps.append(BlockSpan(block, block + 1))
        return tuple(gaps)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model of the swarm, as its servers announce it."""

    model: ModelId
    num_blocks: int
    repository: str
    num_announcers: int


def merge(records: Iterable[ServerRecord], model: str, now: float) -> dict[PeerId, ServerRecord]:
    """The latest unexpired record of every peer for one model, without OFFLINE ones."""
    latest: dict[PeerId, ServerRecord] = {}
    for record in records:
        if record.model != model or record.expires_at <= now:
            continue
        known = latest.get(PeerId(record.peer_id))
        if known is None or known.expires_at < record.expires_at:
            latest[PeerId(record.peer_id)] = record
    return {peer: r for peer, r in latest.items() if r.state is not ServerState.OFFLINE}


def summarize(records: Iterable[ModelRecord], now: float) -> tuple[ModelSummary, ...]:
    """Models by name; where servers disagree about the number of blocks, the majority counts."""
    by_model: dict[str, dict[str, ModelRecord]] = {}
    for record in records:
        if record.expires_at > now:
            by_model.setdefault(record.model, {})[record.peer_id] = record
    summaries = []
    for model, found in sorted(by_model.items()):
        num_blocks, _ = Counter(r.num_blocks for r in found.values()).most_common(1)[0]
        repository, _ = Counter(r.repository for r in found.values()).most_common(1)[0]
        summaries.append(ModelSummary(ModelId(model), num_blocks, repository, len(found)))
    return tuple(summaries)
