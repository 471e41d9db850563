import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import RecordInvalid
from petals.swarm.directory import records
from petals.swarm.directory.records import ModelRecord, ServerRecord, View
from petals.swarm.identity import Identity
from petals.types import BlockSpan, ModelId, ServerState

NOW = 1_700_000_000.0
ME = Identity.generate()


def server(peer: str = ME.peer_id, spans=((0, 10),), **changes) -> ServerRecord:
    fields = {"model": "m", "num_blocks": 30, "state": ServerState.ONLINE, "expires_at": NOW + 60}
    return ServerRecord(peer_id=peer, spans=spans, **(fields | changes))


def test_round_trip():
    record = server(adapters=("a/b",), quant="int8", addresses=("/ip4/1.2.3.4/tcp/5",))
    value = records.seal(record, ME)
    assert records.unseal(value, ServerRecord) == record
    records.check_stored(ME.peer_id, value, record.expires_at, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": ((5, 5),)},
        {"spans": ((7, 3),)},
        {"spans": ((0, 31),)},
        {"expires_at": float("nan")},
        {"expires_at": float("inf")},
        {"public_name": "\x1b[2J"},
        {"adapters": ("ok", "not\nok")},
        {"throughput": -1.0},
        {"num_blocks": 10**6},
        {"state": "asleep"},
        {"adapters": ["a"] * 100},
        {"model": "m" * 300},
    ],
)
def test_values_that_make_no_sense_or_are_out_of_bounds(changes):
    with pytest.raises(RecordInvalid):
        records.unseal(sealed(changes), ServerRecord)


def test_a_record_of_another_version_is_read_without_its_other_fields():
    old = {"network_rps": 3.0, "forward_rps": 812.1}  # as of protocol 7
    assert records.unseal(sealed(old), ServerRecord) == server()


def sealed(changes: dict[str, object]) -> bytes:
    """A signed value that holds a server's fields and these."""
    payload = msgspec.msgpack.encode(msgspec.to_builtins(server()) | changes)
    signature = ME.sign(b"petals record 1\0server\0" + payload)
    return msgspec.msgpack.encode(["server", ME.public_key, payload, signature])


def test_forgery():
    stranger = Identity.generate()
    with pytest.raises(RecordInvalid, match="not signed"):
        records.unseal(records.seal(server(), stranger), ServerRecord)
    kind, key, payload, signature = msgspec.msgpack.decode(records.seal(server(), ME))
    changed = payload.replace(b"online", b"offlin")
    for parts in ([kind, key, changed, signature], [kind, stranger.public_key, payload, signature]):
        with pytest.raises(RecordInvalid):
            records.unseal(msgspec.msgpack.encode(parts), ServerRecord)


def test_a_record_of_another_kind():
    entry = ModelRecord(peer_id=ME.peer_id, model="m", num_blocks=3, expires_at=NOW + 1)
    value = records.seal(entry, ME)
    assert records.unseal(value, ModelRecord) == entry
    with pytest.raises(RecordInvalid):
        records.unseal(value, ServerRecord)


@given(st.binary(max_size=300))
def test_garbage(value):
    with pytest.raises(RecordInvalid):
        records.unseal(value, ServerRecord)


def test_too_long_to_be_stored():
    names = tuple(f"{number:04}" * 60 for number in range(32))
    with pytest.raises(RecordInvalid, match="longer"):
        records.seal(server(adapters=names), ME)
    with pytest.raises(RecordInvalid, match="too long"):
        records.unseal(bytes(records.MAX_VALUE_BYTES + 1), ServerRecord)


@pytest.mark.parametrize(
    "subkey, own_expiry, expires_at, reason",
    [
        (Identity.generate().peer_id, NOW + 60, NOW + 60, None),
        (ME.peer_id, NOW + 60, NOW + 61, None),
        (ME.peer_id, NOW - 1, NOW - 1, "expiry"),
        (ME.peer_id, *[NOW + 2 * records.MAX_LIFETIME_SECONDS] * 2, "expiry"),
    ],
    ids=["another's key", "another time", "expired", "too far away"],
)
def test_what_is_not_kept_for_others(subkey, own_expiry, expires_at, reason):
    value = records.seal(server(expires_at=own_expiry), ME)
    with pytest.raises(RecordInvalid, match=reason):
        records.check_stored(subkey, value, expires_at, NOW)


def test_merge_takes_the_latest_and_leaves_out_the_gone():
    found = records.merge(
        [
            server("a", expires_at=NOW + 5, throughput=1.0),
            server("a", expires_at=NOW + 9, throughput=2.0),
            server("b", expires_at=NOW - 1),
            server("c", expires_at=NOW + 5),
            server("c", expires_at=NOW + 6, state=ServerState.OFFLINE),
            server("d", model="other"),
        ],
        "m",
        NOW,
    )
    assert set(found) == {"a"}
    assert found["a"].throughput == 2.0


def test_view():
    found = [
        server("a", spans=((0, 10),)),
        server("b", spans=((5, 12), (20, 22))),
        server("c", spans=((0, 30),), state=ServerState.JOINING),
    ]
    view = View(ModelId("m"), 30, {r.peer_id: r for r in found}, NOW)
    assert [r.peer_id for r in view.holders(7)] == ["a", "b"]
    assert view.holders(99) == ()
    assert view.coverage()[:6] == (1, 1, 1, 1, 1, 2)
    assert view.missing() == (BlockSpan(12, 20), BlockSpan(22, 30))
    assert view.missing(BlockSpan(11, 13)) == (BlockSpan(12, 13),)


def test_buckets():
    assert records.buckets_of([BlockSpan(0, 16)]) == (0,)
    assert records.buckets_of([BlockSpan(0, 17), BlockSpan(40, 41)]) == (0, 1, 2)
    assert records.buckets_of([BlockSpan(3, 3)]) == ()


@pytest.mark.parametrize("population", [1, 24, 25, 5_000, 10_000, 10**9])
def test_shards_follow_the_population(population):
    bits = records.shard_bits_for(population)
    assert 0 <= bits <= records.MAX_SHARD_BITS
    if bits < records.MAX_SHARD_BITS:
        assert population / (1 << bits) <= records.RECORDS_PER_SHARD
    if bits:
        assert population / (1 << bits) > records.RECORDS_PER_SHARD / 2


def test_models_summary():
    entries = [
        ModelRecord(peer_id="a", model="m", num_blocks=30, expires_at=NOW + 1, repository="r/m"),
        ModelRecord(peer_id="b", model="m", num_blocks=30, expires_at=NOW + 1, repository="r/m"),
        ModelRecord(peer_id="c", model="m", num_blocks=7, expires_at=NOW + 1),
        ModelRecord(peer_id="d", model="old", num_blocks=7, expires_at=NOW - 1),
    ]
    (summary,) = records.summarize(entries, NOW)
    assert (summary.model, summary.num_blocks, summary.repository) == ("m", 30, "r/m")
    assert summary.num_announcers == 3
