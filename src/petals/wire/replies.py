"""What a client receives from a server in a session.

A reply carries the header of its request; Draining, and SessionEnded on the server's own account,
carry request id 0.
"""

from petals.wire.fields import Counter, Message, Position, Seconds, ShortText, Text, WireBlocks
from petals.wire.header import NextHops, Relayed, RequestHeader, Timings


class SessionOpened(Message, frozen=True):
    """The reservation stands; it ends ``lease_seconds`` after the last message of the client."""

    header: RequestHeader
    max_length: Position
    lease_seconds: Seconds


class StepResult(Message, frozen=True):
    """Output of a step. Tensors: hidden ``[sum(counts), hidden_size]``. Seconds are the server's
    own measurements; ``timings`` are those of the hops before it in the direct segment,
    ``relayed`` tells which links between them lead through a relay.

    ``undelivered``: the hops that this output should have been forwarded to and could not be.
    """

    header: RequestHeader
    queue_seconds: Seconds
    compute_seconds: Seconds
    batch_tokens: Position
    timings: Timings = ()
    undelivered: NextHops = ()
    relayed: Relayed = ()


class ReplayDone(Message, frozen=True):
    """The rows are filled, here and in every hop that the replay came through.

    ``undelivered``: they are not, because these hops could not be reached from here.
    """

    header: RequestHeader
    undelivered: NextHops = ()


class ForwardFailed(Message, frozen=True):
    """Unasked: the channel to the next hop broke, and the output of this request (a step or a
    replay) may not have arrived there. Without meaning once the request is answered.
    """

    header: RequestHeader


class Draining(Message, frozen=True):
    """Unasked: the server goes away, and serves the session for ``seconds`` more."""

    header: RequestHeader
    seconds: Seconds


class SessionEnded(Message, frozen=True):
    """Answer to CloseSession; also sent before a server drops a session on its own account."""

    header: RequestHeader
    reason: Text = ""


class Info(Message, frozen=True):
    """A server's present state and its limits. ``trains``: it computes gradients. ``num_tasks``:
    tasks in its event loop; a steady growth would be a leak.

    ``kv_format``: how its blocks compute and what they keep. Keys and values can be moved between
    servers that say the same; empty: they cannot be moved. ``kv_token_bytes``: of one token in all
    of its blocks. ``arithmetic``: what decides how its sums are rounded.
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
    kv_token_bytes: Position = 0
    arithmetic: ShortText = ""
