"""What a server receives in a session: from its client, or from the hop before.

Tensors follow the message that they belong to (``wire.frames``); each docstring says which. Row =
one sequence of a session's batch; hidden states travel packed, ``[sum(counts), hidden_size]`` in
row order. How a server treats epochs and ids:

- a message of an epoch older than the session's is dropped without an answer;
- a message of a newer epoch is held for at most 1 s if another server sent it (the client's
  BeginEpoch may still be on its way), and refused if the client itself sent it, since BeginEpoch
  comes before it on the same channel;
- only BeginEpoch (and OpenSession, for a new reservation) sets a session's epoch and sources;
- a Step whose id was run already is answered from what is kept; a smaller id whose answer is kept
  no more is refused (SessionGap);
- a ReplayPart counts if its ``request_id`` is that of the newest replay and its ``index`` is the
  next one of it. A part of an older replay, and a part that came before, are dropped; a part after
  a gap is refused (SessionGap).
"""

from typing import Annotated

from msgspec import Meta

from petals.wire.fields import (
    MAX_ROWS,
    Counter,
    Message,
    PerRow,
    Position,
    Seconds,
    SessionKeyBytes,
    ShortText,
    WireBlocks,
    WireRopeRuns,
)
from petals.wire.header import NextHops, Relayed, RequestHeader, Sources, Timings


class OpenSession(Message, frozen=True):
    """Reserve cache for ``num_rows`` sequences of up to ``max_length`` tokens (0: it grows with the
    rows) in ``blocks`` of ``model``, under the id of the header. Answered by SessionOpened, also
    when the same request is repeated.

    ``alloc_timeout_seconds``: how long to wait for free cache; 0: not at all. ``dtype``: in which
    hidden states travel. ``sources``: the peers, beside the client, from whom steps of this session
    are accepted. ``next_peer``: the server that the output will be forwarded to, so that a
    connection to it is made before the first step. ``adapter``: one of the server's own or one
    that this client has put there. With ``num_prompt_tokens`` P, deep prompts follow. Tensors:
    prompts ``[len(blocks), P, hidden_size]``, added to positions 0..P-1 of every row on entering
    each block.

    With ``fork_of`` the new rows begin as copies of those of another session of this client here,
    which was opened with the same blocks, dtype, adapter and prompts: row r with its first
    ``fork_lengths[r]`` tokens. The other session does not change. Refused (SessionGap) if it has
    other rows or shorter ones.
    """

    header: RequestHeader
    model: ShortText
    blocks: WireBlocks
    num_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    max_length: Position
    dtype: ShortText
    adapter: ShortText | None = None
    alloc_timeout_seconds: Seconds = 0.0
    sources: Sources = ()
    num_prompt_tokens: Position = 0
    next_peer: ShortText | None = None
    fork_of: SessionKeyBytes | None = None
    fork_lengths: PerRow = ()


class Step(Message, frozen=True):
    """Run ``counts[r]`` tokens of row r from position ``starts[r]``. Tensors: hidden
    ``[sum(counts), hidden_size]``.

    ``starts[r]`` below the row's length rolls the row back first; above it is a gap and refused.
    ``reorder[r]`` names the old row that new row r continues (beam search); it is applied before
    ``starts`` are read and sets the number of rows.

    ``rope_runs`` are the rope lengths of the tokens in packed order: (number of tokens, number of
    tokens of their row after the forward that they belong to). Models with dynamic or LongRoPE
    scaling choose their factors by it. Empty: the tokens are a whole forward, so row r has
    ``starts[r] + counts[r]``.

    ``next_hops`` is the rest of the direct segment: the output is forwarded to the first of them,
    and the last one sends it to the client. ``timings`` are those of the hops passed, ``relayed``
    tells which links passed lead through a relay.
    """

    header: RequestHeader
    starts: PerRow
    counts: PerRow
    reorder: PerRow | None = None
    rope_runs: WireRopeRuns = ()
    next_hops: NextHops = ()
    timings: Timings = ()
    relayed: Relayed = ()


class BeginEpoch(Message, frozen=True):
    """From the client: the header's epoch begins, in which steps are accepted from ``sources`` and
    from the client. Not answered. Also attaches the session to this channel and renews its lease.
    """

    header: RequestHeader
    sources: Sources


class ReplayRequest(Message, frozen=True):
    """From the client: send what this hop has put out, row r as far as ``lengths[r]`` tokens, to
    ``next_hops``; without ``next_hops``, to the client. It is sent as ReplayParts under this
    request's id. The last of the next hops answers with ReplayDone; a hop that cannot do its part
    refuses.

    ``before_step`` is the id of the step that is to follow the replay, ``reorder`` the reorder of
    that step. A hop that has applied this reorder already replays its rows so, and says so in the
    parts (``reordered``); ``lengths`` counts the rows as they were before the reorder. A hop whose
    rows a later step has reordered refuses (SessionGap).

    With ``base_rows`` the receivers keep what they have: row r there continues its row
    ``base_rows[r]``, cut to ``starts[r]``, and only what follows is sent. Without, all rows begin
    anew.

    With ``kv`` the keys and values of these tokens are sent in place of hidden states, to one hop
    that has the same blocks in the same format; refused if a step cuts or reorders the rows
    meanwhile (SessionGap).
    """

    header: RequestHeader
    before_step: Counter
    lengths: PerRow
    next_hops: NextHops
    reorder: PerRow | None = None
    starts: PerRow = ()
    base_rows: PerRow | None = None
    kv: bool = False


class ReplayPart(Message, frozen=True):
    """Part ``index`` (0, 1, …) of the replay ``header.request_id``: run ``counts[r]`` tokens of row
    r from ``starts[r]`` to fill the rows; ``ends`` marks the last part. Part 0 has a ``reorder``:
    ``reorder[r]`` names the row that new row r continues, cut to ``starts[r]``. ``rope_runs`` as in
    Step: those with which the tokens were run first.

    The output goes to ``next_hops`` only; the last hop answers the part that ``ends`` with
    ReplayDone. Without ``next_hops``, and sent by a server, the part brings the rows to the client.
    ``before_step``: the step that is to follow; if the rows stand as the reorder of that step
    leaves them, they are ``reordered``, and the step will not reorder them again.

    Tensors: hidden ``[sum(counts), hidden_size]``. With ``kv``: keys and values
    ``[sum(counts), kv width]`` (block by block, keys before values), so that nothing is computed,
    and, if they are still kept, the outputs of these tokens ``[sum(counts), hidden_size]``.
    """

    header: RequestHeader
    index: Counter
    before_step: Counter
    starts: PerRow
    counts: PerRow
    reorder: PerRow | None = None
    rope_runs: WireRopeRuns = ()
    next_hops: NextHops = ()
    ends: bool = False
    reordered: bool = False
    kv: bool = False


class Forwarded(Message, frozen=True):
    """A hop forwards a step or a part of a replay to the next hop. Tensors: those of the message
    inside, whose header names the session at the receiver.

    The receiver looks the session up as one of ``client``, accepts it only from the session's
    sources, and answers nothing but refusals.
    """

    client: ShortText
    message: Step | ReplayPart


class KeepSession(Message, frozen=True):
    """The client is alive: the lease begins anew, and replies come on this channel. Answered only
    by SessionEnded, if there is no such session.
    """

    header: RequestHeader


class CloseSession(Message, frozen=True):
    """Free the cache of this reservation, in any epoch. Answered by SessionEnded. Idempotent."""

    header: RequestHeader


class GetInfo(Message, frozen=True):
    """Ask a server for its present state (what changes too fast for the directory)."""
