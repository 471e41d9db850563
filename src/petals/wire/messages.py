"""Every message of the protocol, as a frozen struct whose bounds are checked while it is decoded.

A stream begins with ``Hello`` -> ``Welcome`` or ``Refusal``; then the service named in the hello
speaks. Tensors follow the message they belong to (``wire.frames``); each docstring says which. Row
= one sequence of a session's batch; hidden states travel packed, ``[sum(counts), hidden_size]`` in
row order. Knows no sockets and makes no decisions.

| version | change |
| ------- | ------ |
| 1       | first  |
| 2       | rings: sources, SetRoute, Push, Replay, Replayed; steps carry timings |
| 3       | training: Backward, kept passes, taps, deep prompts, PutAdapter        |
| 4       | Leaving; a Replay may go on where an earlier one ended, or come to us  |
| 5       | steps tell which edges are relayed; OpenSession names the next hop     |
| 6       | Undelivered: what two hops may have lost; Info counts tasks            |
| 7       | a Replay may bring what blocks keep, from a server that leaves         |
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from petals.errors import PetalsError, ProtocolError, from_wire
from petals.types import BlockSpan
from petals.wire.fields import (
    MAX_ROWS,
    MAX_TENSORS,
    Counter,
    Message,
    PerRow,
    Position,
    Seconds,
    SessionKeyBytes,
    ShortText,
    Text,
    Ticket,
    WireBlocks,
)
from petals.wire.passes import (
    AdapterKept,
    Backward,
    BackwardResult,
    Forward,
    ForwardResult,
    PutAdapter,
)
from petals.wire.specs import TensorSpec


class Hello(Message):
    """First frame of every stream, from the side that opened it."""

    version: Position
    service: ShortText
    ticket: Ticket = b""
    agent: ShortText = ""


class Welcome(Message):
    """The stream is admitted; the ticket proves that the answering side is a member, too."""

    version: Position
    agent: ShortText = ""
    ticket: Ticket = b""


class Refusal(Message):
    """The last message of a stream, or the answer to one request: a typed error."""

    code: ShortText
    message: Text
    hint: Text = ""
    step_id: Counter | None = None

    @classmethod
    def of(cls, error: PetalsError, step_id: int | None = None) -> "Refusal":
        return cls(error.code, error.message[:4096], error.hint[:4096], step_id)

    def to_error(self, peer_id: str) -> PetalsError:
        return from_wire(self.code, self.message, self.hint, peer_id)


class NextHop(Message):
    """A later hop of an arc: consecutive hops that hand states on directly."""

    peer_id: ShortText
    blocks: WireBlocks


NextHops = Annotated[tuple[NextHop, ...], Meta(max_length=256)]
Sources = Annotated[tuple[ShortText, ...], Meta(max_length=16)]
Timing = tuple[Seconds, Seconds, Position]
"""What a hop measured of one step: seconds queued, seconds computed, tokens in its batch."""
Timings = Annotated[tuple[Timing, ...], Meta(max_length=256)]
Relayed = Annotated[tuple[bool, ...], Meta(max_length=256)]
"""For every edge of an arc that a step has passed: whether it came through a relay."""


class OpenSession(Message):
    """Reserve room for ``num_rows`` sequences of up to ``max_length`` tokens in ``blocks`` of
    ``model``.

    ``alloc_timeout_seconds`` 0 asks for an answer at once. ``dtype`` is what the states will travel
    in. ``sources`` are the peers, beside the client, from whom states of this session are taken;
    ``onward`` is the one they will go on to, to be met in good time.
    ``adapter`` names one of the server's own or one that this client has put there. With
    ``num_prompt_tokens`` P, deep prompts follow. Tensors: prompts ``[len(blocks), P,
    hidden_size]``, added to positions 0..P-1 of every row on entering each block.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    model: ShortText
    blocks: WireBlocks
    num_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    max_length: Position
    dtype: ShortText
    adapter: ShortText | None = None
    alloc_timeout_seconds: Seconds = 0.0
    sources: Sources = ()
    num_prompt_tokens: Position = 0
    onward: ShortText | None = None


class SessionOpened(Message):
    """The reservation stands for as long as the client gives signs of life, and
    ``lease_seconds`` beyond the last.
    """

    session_id: SessionKeyBytes
    max_length: Position
    lease_seconds: Seconds


class Step(Message):
    """Run ``counts[r]`` tokens of row r from position ``starts[r]``. Tensors: hidden
    ``[sum(counts), hidden_size]``.

    ``starts[r]`` below the row's length rolls it back first; above it is a gap and refused.
    ``reorder[r]`` names the old row that new row r continues (beam search); it is applied before
    ``starts`` are read and sets the row count. Step ids only grow within a session; a repeated id
    is answered again and does no work twice.

    ``next_hops`` is the rest of the arc: the output goes to the first of them, and that of the last
    one to the client on the client's own channel to it. ``timings`` are those of the hops passed,
    ``relayed`` tells of the edges passed.

    A ``replay`` refills rows: nobody gets its output but the next hops; the last hop answers the
    replay that ``ends`` with Replayed. Its ``step_id`` is the step that is to follow; if the rows
    are replayed as that step's reorder has left them, they are ``reordered`` and the step will not
    reorder them again. A replay of ``pages`` brings what the same blocks keep of the tokens
    elsewhere, so that nothing is computed. Tensors: pages ``[sum(counts), page width]`` (block by
    block, keys before values), and, if it is still kept, what was put out for them
    ``[sum(counts), hidden_size]``.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    step_id: Counter
    starts: PerRow
    counts: PerRow
    reorder: PerRow | None = None
    next_hops: NextHops = ()
    timings: Timings = ()
    replay: bool = False
    ends: bool = False
    reordered: bool = False
    relayed: Relayed = ()
    pages: bool = False


class StepResult(Message):
    """Output of a step. Tensors: hidden ``[sum(counts), hidden_size]``. Seconds are the
    server's own measurements; ``timings`` are those of the hops before it in the arc, ``relayed``
    tells of the edges between them.

    ``undelivered``: the hops that this output was meant for and could not be handed to.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    step_id: Counter
    queue_seconds: Seconds
    compute_seconds: Seconds
    batch_tokens: Position
    timings: Timings = ()
    undelivered: NextHops = ()
    relayed: Relayed = ()


class ForwardedStep(Message):
    """A hop hands its output to the next one. Tensors: hidden ``[sum(counts), hidden_size]``.

    The session is the one that ``client`` has opened there for ``blocks``. Only its sources are
    heard, and only a refusal ever comes back.
    """

    client: ShortText
    blocks: WireBlocks
    step: Step


class BeginEpoch(Message):
    """From the client: a new epoch begins, in which states come from ``sources``. Not answered.

    Frames of older epochs are dropped from now on.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    sources: Sources


class Replay(Message):
    """From the client: push what this hop has put out, row r as far as ``lengths[r]`` tokens, to
    ``next_hops``.

    ``step_id`` is the step that follows, ``reorder`` is that of this step. A hop that has reordered
    its rows for it already replays them so, and says so; ``lengths`` still counts the rows as they
    were before. The last of ``next_hops`` answers with Replayed; a hop that cannot do its part
    refuses, with the step id. So does one whose rows a later step has reordered. Without
    ``next_hops`` the steps of the replay come to the client, which carries them on.

    With ``onto`` an earlier replay goes on: row r continues row ``onto[r]`` there, which is cut to
    ``starts[r]``, and only what follows is pushed. Without, all rows begin anew.

    With ``pages``, what the blocks keep of these tokens is pushed instead, to one hop that has the
    same blocks in the same form; it is refused if a step cuts or reorders the rows meanwhile.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    step_id: Counter
    lengths: PerRow
    next_hops: NextHops
    reorder: PerRow | None = None
    starts: PerRow = ()
    onto: PerRow | None = None
    pages: bool = False


class Replayed(Message):
    """The rows are refilled, here and in every hop the replay came through.

    ``undelivered``: they are not, because these hops could not be reached from here.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    undelivered: NextHops = ()


class ForwardFailed(Message):
    """From a hop, unasked: its channel to the next hop has broken, and the output of this step (or
    of this ``replay``) may not have arrived there. Means nothing once the step is answered.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    step_id: Counter
    replay: bool = False


class KeepSession(Message):
    """A sign of life between steps: the lease begins anew, and answers come on this channel.

    ``blocks`` tell apart several sessions of one id at one server. Answered only by SessionEnded,
    if there is no such session.
    """

    session_id: SessionKeyBytes
    blocks: WireBlocks | None = None


class Draining(Message):
    """From the server, unasked: it is going away, and serves the session for ``seconds`` more."""

    session_id: SessionKeyBytes
    seconds: Seconds


class CloseSession(Message):
    """Free everything that the session of this channel holds."""

    session_id: SessionKeyBytes


class SessionEnded(Message):
    """Answer to CloseSession; also sent unasked before a server drops a session."""

    session_id: SessionKeyBytes
    reason: Text = ""


class GetInfo(Message):
    """Ask a server how it is right now (what changes too fast for the directory)."""


class Info(Message):
    """A server's present state and its limits. ``trains``: it gives gradients. ``num_tasks`` run in
    its event loop: more and more of them would be a leak.

    ``kv_format`` says how its blocks compute and what they keep: who says the same can take pages
    from it. Empty: nobody can. ``page_bytes``: of one token in all of its blocks.
    """

    model: ShortText
    blocks: WireBlocks
    state: ShortText
    hidden_size: Position
    dtype: ShortText
    max_length: Position
    max_batch_tokens: Position
    tokens_free: Counter
    num_sessions: Position
    queue_tokens: Position
    step_seconds: Seconds
    outbox_bytes_free: Counter = 0
    trains: bool = False
    num_tasks: Position = 0
    kv_format: ShortText = ""
    page_bytes: Position = 0


class DialBack(Message):
    """Ask a peer to open a stream to us at these addresses (are we reachable?)."""

    addresses: Annotated[tuple[ShortText, ...], Meta(max_length=16)]


class DialedBack(Message):
    """Whether the peer reached us, and the time on its clock (seconds since the epoch, for the
    skew).
    """

    reached: bool
    wall_clock_seconds: float


AnyMessage = (
    Hello
    | Welcome
    | Refusal
    | OpenSession
    | SessionOpened
    | Step
    | StepResult
    | ForwardedStep
    | BeginEpoch
    | Replay
    | Replayed
    | ForwardFailed
    | KeepSession
    | Draining
    | CloseSession
    | SessionEnded
    | Forward
    | ForwardResult
    | Backward
    | BackwardResult
    | PutAdapter
    | AdapterKept
    | GetInfo
    | Info
    | DialBack
    | DialedBack
)
Specs = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[AnyMessage, Specs])


def encode_message(message: Message, specs: tuple[TensorSpec, ...] = ()) -> bytes:
    """Payload of a MESSAGE frame."""
    return _encoder.encode((message, specs))


def decode_message(payload: bytes) -> tuple[AnyMessage, tuple[TensorSpec, ...]]:
    """Payload of a MESSAGE frame -> message and specs of the tensors that follow. Raises
    ProtocolError.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A message could not be read: {error}") from error


def span(blocks: WireBlocks) -> BlockSpan:
    """``(start, end)`` off the wire -> BlockSpan. Raises ProtocolError if it is empty or
    reversed.
    """
    if blocks[0] >= blocks[1]:
        raise ProtocolError(f"WireBlocks {blocks[0]}:{blocks[1]} are not a span.")
    return BlockSpan(*blocks)
