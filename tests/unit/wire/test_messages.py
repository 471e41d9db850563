"""Messages and frames: what is valid comes back equal, everything else is a ProtocolError."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.errors import ERRORS_BY_CODE, MissingBlocksError, PeerFailed, ProtocolError
from petals.wire import fields, frames, handshake, messages, passes, replies, requests
from petals.wire.frames import FrameKind, TensorSpec
from petals.wire.header import NextHop, RequestHeader

SESSION = b"s" * 16
HEADER = RequestHeader(SESSION, 2, 7)
HOPS = (NextHop("p", b"n" * 16),)
RUNS = ((1, 9), (4, 6))
STEP = requests.Step(HEADER, (3, 0), (1, 4), (0, 0), RUNS, HOPS, ((0.1, 0.2, 5),), (True,))
PART = requests.ReplayPart(HEADER, 1, 6, (3,), (1,), None, RUNS, HOPS, True, True)
EXAMPLES = [
    handshake.Hello(1, "blocks", b"ticket", "petals/3"),
    handshake.Welcome(1),
    handshake.Refusal("cache_full", "No room.", "Wait.", HEADER),
    handshake.DialBack(("/ip4/127.0.0.1/tcp/1",)),
    handshake.DialedBack(True, 1.5),
    requests.OpenSession(HEADER, "m", (0, 10), 2, 128, "float32"),
    requests.OpenSession(
        HEADER, "m", (0, 10), 2, 0, "float32", fork_of=SESSION, fork_lengths=(3, 0)
    ),
    STEP,
    PART,
    requests.Forwarded("client", STEP),
    requests.Forwarded("client", PART),
    requests.BeginEpoch(HEADER, ("p",)),
    requests.ReplayRequest(HEADER, 6, (5, 0), HOPS, (1, 0), (4, 0), (0, 1), True),
    requests.KeepSession(HEADER),
    requests.CloseSession(HEADER),
    requests.GetInfo(),
    replies.SessionOpened(HEADER, 128, 60.0),
    replies.StepResult(HEADER, 0.1, 0.2, 5, ((0.1, 0.2, 5),), HOPS),
    replies.ReplayDone(HEADER, HOPS),
    replies.ForwardFailed(HEADER),
    replies.Draining(HEADER, 3.0),
    replies.SessionEnded(HEADER, "lease ended"),
    passes.Forward("m", (0, 3), (5, 6)),
    passes.Forward("m", (0, 3), (5, 6), "a", 4, (0, 2), SESSION),
    passes.ForwardResult(0.0, 0.1, True, 60.0),
    passes.Backward(passes.Forward("m", (0, 3), (5, 6)), True, True),
    passes.BackwardResult(0.0, 0.1, True),
    passes.PutAdapter("m", "sha256:0", (passes.AdapterPart(1, "self_attn.q_proj", 8, 2.0),)),
    passes.AdapterKept("sha256:0", 60.0),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: fields.Message) -> None:
    specs = (TensorSpec("float32", (5, 8)),)
    assert frames.decode_message(frames.encode_message(message, specs)) == (message, specs)


def test_the_bytes_of_a_step_do_not_change_by_accident() -> None:
    """An older peer reads these bytes; a change here needs a new PROTOCOL_VERSION."""
    step = requests.Step(HEADER, (3,), (1,))
    fields = ["Step", [SESSION, 2, 7], (3,), (1,), None, (), (), (), ()]
    expected = msgspec.msgpack.encode((fields, ()))
    assert frames.PROTOCOL_VERSION == 9
    assert frames.encode_message(step) == expected


H = [SESSION, 0, 1]


@pytest.mark.parametrize(
    "fields",
    [
        ["Step", [b"short", 0, 1], [0], [1]],
        ["Step", [SESSION, -1, 1], [0], [1]],
        ["Step", [SESSION, 0, 2**53 + 1], [0], [1]],
        ["Step", [SESSION, 0, 1, 2], [0], [1]],
        ["Step", [], [0], [1]],
        ["Step", None, [0], [1]],
        ["Step", H, [-1], [1]],
        ["Step", H, [0], [2**40]],
        ["Step", H, [0] * 1025, [1]],
        ["Step", H, [0], [1], None, [[0, 1]]],
        ["Step", H, [0], [1], None, [[1, -1]]],
        ["Step", H, [0], [1], None, [[1, 2**31]]],
        ["Step", H, [0], [1], None, [[1, 1, 1]]],
        ["Step", H, [0], [1], None, [[1, 1]] * 16385],
        ["Step", H, [0], [1], None, [], [["p", b"short"]]],
        ["Step", H, [0], [1], None, [], [["p", SESSION]] * 257],
        ["Step", H, [0], [1], None, [], [], [[0.1, 0.2, 5]] * 257],
        ["Step", H, [0], [1], None, [], [], [], [True] * 257],
        ["ReplayPart", H, -1, 0, [0], [1]],
        ["ReplayPart", H, 0, 0, [0] * 1025, [1]],
        ["Forwarded", "client", ["StepResult", H, 0.1, 0.2, 5]],
        ["Forwarded", "client", ["Forwarded", "client", ["Step", H, [0], [1]]]],
        ["BeginEpoch", H, ["p"] * 17],
        ["ReplayRequest", H, 1, [0] * 1025, []],
        ["OpenSession", H, "m", [0, 1], 0, 1, "float32"],
        ["OpenSession", H, "m" * 257, [0, 1], 1, 1, "float32"],
        ["OpenSession", H, "m", [0, 1], 1, 1, "float32", None, 0.0, ["p"] * 17],
        ["OpenSession", H, "m", [0, 1], 1, 1, "float32", None, 0.0, [], 0, None, b"short"],
        ["OpenSession", H, "m", [0, 1], 1, 1, "float32", None, 0.0, [], 0, None, SESSION, [-1]],
        ["Refusal", "code", "m" * 4097],
        ["Forward", "m", [0, 1], [1], None, 0, [], b"short"],
        ["Backward", ["ForwardResult", 0.0, 0.1]],
        ["PutAdapter", "m", "a", [[0, "q", 0, 1.0]]],
        ["PutAdapter", "m", "a", [[0, "q", 8, 1e9]]],
        ["Hello", 1, "blocks", b"t" * 513, ""],
        ["GetInfo", 1],
        ["Nonsense"],
        [],
        "text",
        None,
    ],
)
def test_values_out_of_bounds_are_refused(fields: object) -> None:
    with pytest.raises(ProtocolError):
        frames.decode_message(msgspec.msgpack.encode((fields, [])))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.decode_message(payload)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_damaged_message_decodes_or_raises_protocol_error(
    message: fields.Message, data: st.DataObject
) -> None:
    payload = bytearray(frames.encode_message(message))
    index = data.draw(st.integers(0, len(payload) - 1))
    payload[index] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (bytes(payload), bytes(payload[:cut])):
        try:
            decoded, _ = frames.decode_message(damaged)
        except ProtocolError:
            continue
        assert isinstance(decoded, fields.Message)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        frames.decode_message(b"\x91" * 100_000)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=5, max_size=5))
def test_a_frame_header_is_bounded_or_refused(header: bytes) -> None:
    try:
        kind, length = frames.decode_header(header)
    except ProtocolError:
        return
    limit = frames.MAX_CHUNK_BYTES if kind is FrameKind.CHUNK else frames.MAX_HEADER_BYTES
    assert length <= limit


def test_credit_round_trip() -> None:
    frame = frames.encode_credit(4_000_000_000)
    kind, length = frames.decode_header(frame[:5])
    assert (kind, length) == (FrameKind.CREDIT, 4)
    assert frames.decode_credit(frame[5:]) == 4_000_000_000


def test_an_empty_span_off_the_wire_is_refused() -> None:
    with pytest.raises(ProtocolError):
        messages.span((4, 4))


def test_errors_travel_by_code_and_keep_their_type() -> None:
    refusal = handshake.Refusal.of(
        MissingBlocksError("Blocks 3:5 are missing.", hint="Serve them.")
    )
    error = refusal.to_error("Qm123456")
    assert type(error) is MissingBlocksError
    assert str(error).startswith("Peer …123456 says: Blocks 3:5 are missing. (Serve them.)\nhint: ")
    assert type(handshake.Refusal("from_the_future", "?").to_error("p")) is PeerFailed
    assert len(ERRORS_BY_CODE) == len(set(ERRORS_BY_CODE.values()))
