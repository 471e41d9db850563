"""Sending with a deadline.

A channel waits for the peer's credit as long as the peer answers pings. A peer that gives no credit
could hold a task, a lock or memory for ever. Knows channels; knows no message's meaning.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from petals.clock import Clock
from petals.errors import PeerTimeout
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.rpc.channel import Channel
from petals.wire.fields import Message


async def send_or_abort(
    channel: Channel,
    message: Message,
    tensors: Sequence[Tensor],
    limits: FailoverConfig,
    clock: Clock,
) -> None:
    """Send a message; abort the channel if that takes longer than ``limits`` allow.

    The channel is aborted, not only the message: what is sent on a channel arrives completely and
    in order, or the peer sees that the channel ended. Raises what ``Channel.send`` raises, and
    PeerTimeout.
    """
    seconds = limits.send_limit_seconds(sum(tensor.nbytes for tensor in tensors))
    timer = clock.call_later(seconds, partial(_abort, channel, seconds))
    try:
        await channel.send(message, tensors)
    finally:
        timer.cancel()


def _abort(channel: Channel, seconds: float) -> None:
    channel.abort(
        PeerTimeout(f"A message was not taken within {seconds:.1f} s.", peer_id=channel.peer_id)
    )
