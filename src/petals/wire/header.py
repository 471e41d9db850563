"""The header of every request in a session and of every reply to it, and the ids of later hops.

Knows no message; each message that concerns a session begins with a header.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from petals.wire.fields import Counter, Position, Seconds, SessionKeyBytes, ShortText


class RequestHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which request a message makes or answers.

    ``session_id``: the reservation at the server that receives or sends the message. The client
    draws it at random (16 bytes) for every reservation, so that no two reservations of a client,
    not even two for the same blocks at the same server, share an id.
    ``epoch``: grows by 1 whenever the client changes the hops of the session. A receiver drops a
    message of an older epoch.
    ``request_id``: grows within a session over all of its hops. A repeated step keeps its id, so
    that a hop that has run it answers again and does no work twice; every replay has an id of its
    own. 0 in messages that are no answer to a request (Draining, SessionEnded on a server's own
    account) and in KeepSession, BeginEpoch and CloseSession, which are not answered by id.

    A reply carries the header of its request, as the replying server received it. A client accepts
    a reply if all three fields equal those of a request that it still waits for; this is the only
    rule by which replies are matched.
    """

    session_id: SessionKeyBytes
    epoch: Counter
    request_id: Counter = 0


class NextHop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A later hop of a direct segment (consecutive hops that forward to each other), and the id of
    the session's reservation there.
    """

    peer_id: ShortText
    session_id: SessionKeyBytes


NextHops = Annotated[tuple[NextHop, ...], Meta(max_length=256)]
Sources = Annotated[tuple[ShortText, ...], Meta(max_length=16)]
Timing = tuple[Seconds, Seconds, Position]
"""What a hop measured of one step: seconds queued, seconds computed, tokens in its batch."""
Timings = Annotated[tuple[Timing, ...], Meta(max_length=256)]
Relayed = Annotated[tuple[bool, ...], Meta(max_length=256)]
"""For every link of a direct segment that a step has passed: whether it leads through a relay."""
