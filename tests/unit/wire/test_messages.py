"""Messages and frames: what is valid comes back equal, everything else is a ProtocolError."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.errors import ERRORS_BY_CODE, MissingBlocksError, PeerFailed, ProtocolError
from petals.wire import fields, frames, messages, passes
from petals.wire.frames import FrameKind
from petals.wire.specs import TensorSpec

SESSION = b"s" * 16
EXAMPLES = [
    messages.Hello(1, "blocks", b"ticket", "petals/3"),
    messages.Welcome(1),
    messages.Refusal("cache_full", "No room.", "Wait.", 3),
    messages.OpenSession(SESSION, 0, "m", (0, 10), 2, 128, "float32"),
    messages.SessionOpened(SESSION, 128, 60.0),
    messages.Step(SESSION, 0, 1, (3, 0), (1, 4), (0, 0), (messages.NextHop("p", (10, 20)),)),
    messages.StepResult(SESSION, 0, 1, 0.1, 0.2, 5, ((0.1, 0.2, 5),)),
    messages.ForwardedStep(
        "client", (10, 20), messages.Step(SESSION, 1, 2, (3,), (1,), replay=True)
    ),
    messages.BeginEpoch(SESSION, 2, ("p",)),
    messages.Replay(SESSION, 2, 7, (5, 0), (messages.NextHop("p", (10, 20)),)),
    messages.Replayed(SESSION, 2),
    messages.ForwardFailed(SESSION, 2, 1, True),
    messages.KeepSession(SESSION),
    messages.CloseSession(SESSION),
    messages.SessionEnded(SESSION, "lease ended"),
    passes.Forward("m", (0, 3), (5, 6)),
    passes.Forward("m", (0, 3), (5, 6), "a", 4, (0, 2), SESSION),
    passes.ForwardResult(0.0, 0.1, True, 60.0),
    passes.Backward(passes.Forward("m", (0, 3), (5, 6)), True, True),
    passes.BackwardResult(0.0, 0.1, True),
    passes.PutAdapter("m", "sha256:0", (passes.AdapterPart(1, "self_attn.q_proj", 8, 2.0),)),
    passes.AdapterKept("sha256:0", 60.0),
    messages.GetInfo(),
    messages.DialBack(("/ip4/127.0.0.1/tcp/1",)),
    messages.DialedBack(True, 1.5),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: fields.Message) -> None:
    specs = (TensorSpec("float32", (5, 8)),)
    assert messages.decode_message(messages.encode_message(message, specs)) == (message, specs)


def test_the_bytes_of_a_step_do_not_change_by_accident() -> None:
    """An older peer reads these bytes; a change here needs a new PROTOCOL_VERSION."""
    step = messages.Step(SESSION, 1, 2, (3,), (1,))
    fields = ["Step", SESSION, 1, 2, (3,), (1,), None, (), (), False, False, False, (), False]
    expected = msgspec.msgpack.encode((fields, ()))
    assert frames.PROTOCOL_VERSION == 8
    assert messages.encode_message(step) == expected


@pytest.mark.parametrize(
    "fields",
    [
        ["Step", b"short", 0, 1, [0], [1], None, []],
        ["Step", SESSION, 0, 1, [-1], [1], None, []],
        ["Step", SESSION, 0, 1, [0], [2**40], None, []],
        ["Step", SESSION, 0, 1, [0] * 1025, [1], None, []],
        ["Step", SESSION, 0, 1, [0], [1], None, [], [[0.1, 0.2, 5]] * 257],
        ["ForwardedStep", "client", [0, 1], ["StepResult", SESSION, 0, 1, 0.1, 0.2, 5]],
        ["BeginEpoch", SESSION, 0, ["p"] * 17],
        ["Replay", SESSION, 0, 1, [0] * 1025, []],
        ["OpenSession", SESSION, 0, "m", [0, 1], 0, 1, "float32"],
        ["Forward", "m", [0, 1], [1], None, 0, [], b"short"],
        ["Backward", ["ForwardResult", 0.0, 0.1]],
        ["PutAdapter", "m", "a", [[0, "q", 0, 1.0]]],
        ["PutAdapter", "m", "a", [[0, "q", 8, 1e9]]],
        ["OpenSession", SESSION, 0, "m" * 257, [0, 1], 1, 1, "float32"],
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
        messages.decode_message(msgspec.msgpack.encode((fields, [])))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.decode_message(payload)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_damaged_message_decodes_or_raises_protocol_error(
    message: fields.Message, data: st.DataObject
) -> None:
    payload = bytearray(messages.encode_message(message))
    index = data.draw(st.integers(0, len(payload) - 1))
    payload[index] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (bytes(payload), bytes(payload[:cut])):
        try:
            decoded, _ = messages.decode_message(damaged)
        except ProtocolError:
            continue
        assert isinstance(decoded, fields.Message)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        messages.decode_message(b"\x91" * 100_000)


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
    refusal = messages.Refusal.of(MissingBlocksError("Blocks 3:5 are missing.", hint="Serve them."))
    error = refusal.to_error("Qm123456")
    assert type(error) is MissingBlocksError
    assert "…123456" in str(error) and "hint: Serve them." in str(error)
    assert type(messages.Refusal("from_the_future", "?").to_error("p")) is PeerFailed
    assert len(ERRORS_BY_CODE) == len(set(ERRORS_BY_CODE.values()))
