"""The protocol: every message.

A stream begins with ``Hello`` -> ``Welcome`` or ``Refusal``; then the service named in the hello
speaks. Messages are frozen structs, one file per receiver, whose bounds are checked while they are
decoded: ``handshake`` (any peer), ``requests`` (a server in a session), ``replies`` (a client),
``passes`` (training and adapters, both ends). Knows no sockets and makes no decisions.

| version | change |
| ------- | ------ |
| 1       | first  |
| 2       | rings: sources, SetRoute, Push, Replay, Replayed; steps carry timings |
| 3       | training: Backward, kept passes, taps, deep prompts, PutAdapter        |
| 4       | Leaving; a Replay may go on where an earlier one ended, or come to us  |
| 5       | steps tell which edges are relayed; OpenSession names the next hop     |
| 6       | Undelivered: what two hops may have lost; Info counts tasks            |
| 7       | a Replay may bring what blocks keep, from a server that leaves         |
| 8       | one header (session, epoch, request) on requests and replies; session  |
|         | ids per reservation; replays have ids and numbered parts; new names    |
| 9       | OpenSession may fork a session                                         |
"""

from petals.errors import ProtocolError
from petals.types import BlockSpan
from petals.wire.fields import WireBlocks
from petals.wire.handshake import DialBack, DialedBack, Hello, Refusal, Welcome
from petals.wire.passes import (
    AdapterKept,
    Backward,
    BackwardResult,
    Forward,
    ForwardResult,
    PutAdapter,
)
from petals.wire.replies import (
    Draining,
    ForwardFailed,
    Info,
    ReplayDone,
    SessionEnded,
    SessionOpened,
    StepResult,
)
from petals.wire.requests import (
    BeginEpoch,
    CloseSession,
    Forwarded,
    GetInfo,
    KeepSession,
    OpenSession,
    ReplayPart,
    ReplayRequest,
    Step,
)

AnyMessage = (
    Hello
    | Welcome
    | Refusal
    | OpenSession
    | SessionOpened
    | Step
    | StepResult
    | Forwarded
    | BeginEpoch
    | ReplayRequest
    | ReplayPart
    | ReplayDone
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


def span(blocks: WireBlocks) -> BlockSpan:
    """``(start, end)`` off the wire -> BlockSpan. Raises ProtocolError if it is empty or
    reversed.
    """
    if blocks[0] >= blocks[1]:
        raise ProtocolError(f"Blocks {blocks[0]}:{blocks[1]} are not a span.")
    return BlockSpan(*blocks)
