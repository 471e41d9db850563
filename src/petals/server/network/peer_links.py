"""Long-lived channels to the servers that outputs are forwarded to, shared by all sessions.

A link is one channel to one peer: one for the steps of all sessions, and one for each session that
is replayed, so that the back-pressure of a replay does not hold up steps. What is sent on a link
arrives in order. When a link breaks, the senders of what may not have arrived are called back.
Knows peers and messages; knows no sessions and no steps.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from typing import Any

from torch import Tensor

from petals.clock import Clock
from petals.errors import PeerBusy, PeerError, PeerTimeout, PeerUnreachable, PetalsError
from petals.logs import get_logger
from petals.swarm.background import BackgroundTasks
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.services import RING_SERVICE

logger = get_logger(__name__)

OpenChannel = Callable[[PeerId, str, float], Awaitable[Channel]]
OnLost = Callable[[], Coroutine[Any, Any, None]]


class UnackedSends:
    """What was sent on a channel and may not have arrived: when, and whom to call in that case.

    A pong confirms all that was sent before its ping. At most ``max_sends`` are remembered; of
    older ones a loss is not reported (the client notices it by a timeout).
    """

    def __init__(self, max_sends: int) -> None:
        self._sends: deque[tuple[float, OnLost]] = deque(maxlen=max_sends)

    def note(self, now: float, on_lost: OnLost, channel: Channel) -> None:
        self._sends.append((now, on_lost))
        while self._sends[0][0] < channel.confirmed_at:
            self._sends.popleft()

    def lost(self, channel: Channel) -> list[OnLost]:
        """Whom to call once the channel has broken, in the order in which they sent."""
        return [on_lost for sent_at, on_lost in self._sends if sent_at >= channel.confirmed_at]


class Link:
    """One channel to ``peer``, when there is one."""

    def __init__(self, peer: PeerId, idle_seconds: float, max_sends: int) -> None:
        self.peer = peer
        self.idle_seconds = idle_seconds
        self.channel: Channel | None = None
        self.in_order = asyncio.Lock()
        self.used_at = 0.0
        self.broken_until = 0.0
        self.sent = UnackedSends(max_sends)

    @property
    def is_in_use(self) -> bool:
        return self.channel is not None or self.in_order.locked()


class PeerLinks:
    """The links of one server; ``close`` them."""

    def __init__(self, open_channel: OpenChannel, clock: Clock, limits: FailoverConfig) -> None:
        self._open_channel = open_channel
        self._clock = clock
        self._limits = limits
        self._links: dict[tuple[PeerId, Hashable], Link] = {}
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
        """End all channels."""
        await self._tasks.close()
        self._links.clear()

    def connect(self, peer: PeerId) -> None:
        """Open the common link to ``peer`` ahead of its first use."""
        with contextlib.suppress(PeerBusy):
            link = self._link(peer, None)
            if not link.is_in_use:
                self._tasks.start(self._open(link), "connecting to a next hop")

    async def send(
        self,
        peer: PeerId,
        message: Message,
        tensors: Sequence[Tensor],
        on_lost: OnLost,
        *,
        replay_of: Hashable = None,
    ) -> None:
        """Send on the common link, or on the link of a session that is replayed.

        Opens a channel if there is none, and once more if the one there is turns out broken.
        ``on_lost`` is called if the link breaks later and the message may not have arrived. Raises
        PeerError or RequestTooLarge.
        """
        link = self._link(peer, replay_of)
        async with link.in_order:
            for is_last_try in (link.channel is None, True):
                channel = link.channel or await self._dial(link)
                try:
                    await channel.send(message, tensors)
                    _check_open(channel)
                except PeerTimeout as error:
                    # The peer lives and takes nothing: a new channel would wait as long.
                    self._break(link, channel)
                    channel.abort(error)
                    raise
                except PeerError:
                    link.channel = None
                    if is_last_try:
                        raise
                else:
                    link.used_at = self._clock.monotonic()
                    link.sent.note(link.used_at, on_lost, channel)
                    return

    def _link(self, peer: PeerId, replay_of: Hashable) -> Link:
        limits, key = self._limits, (peer, replay_of)
        if key not in self._links:
            if len(self._links) >= limits.max_links:
                self._links = {k: link for k, link in self._links.items() if link.is_in_use}
            if len(self._links) >= limits.max_links:
                raise PeerBusy("This server forwards to too many others.", peer_id=peer)
            is_common = replay_of is None
            idle = limits.link_idle_seconds if is_common else limits.replay_link_idle_seconds
            self._links[key] = Link(peer, idle, limits.max_unconfirmed)
        return self._links[key]

    async def _open(self, link: Link) -> None:
        async with link.in_order:
            with contextlib.suppress(PeerError):
                if link.channel is None:
                    await self._dial(link)

    async def _dial(self, link: Link) -> Channel:
        if self._clock.monotonic() < link.broken_until:
            # Those that wait in line behind a dial that has failed do not dial one after the other.
            raise PeerUnreachable("The peer did not answer a moment ago.", peer_id=link.peer)
        seconds = self._limits.link_dial_seconds
        try:
            channel = await self._open_channel(link.peer, RING_SERVICE, seconds)
        except PetalsError as error:
            link.broken_until = self._clock.monotonic() + self._limits.link_rest_seconds
            reason = f"No channel to the next hop: {error.message}"
            raise PeerUnreachable(reason, peer_id=link.peer) from error
        channel.silence_seconds = self._limits.silence_seconds
        channel.send_seconds = self._limits.send_seconds
        link.channel, link.used_at = channel, self._clock.monotonic()
        link.sent = UnackedSends(self._limits.max_unconfirmed)
        self._tasks.start(self._listen(link, channel, link.sent), "listening to a next hop")
        return channel

    async def _listen(self, link: Link, channel: Channel, sent: UnackedSends) -> None:
        """The life of a channel: nothing comes on it but refusals; long idleness ends it."""
        try:
            while not self._is_idle(link):
                try:
                    answer, _ = await channel.receive(link.idle_seconds)
                except PeerTimeout:
                    if channel.is_closed:
                        raise
                    continue
                if isinstance(answer, Refusal):
                    logger.info("…%s refused a message: %s", link.peer[-6:], answer.message)
        except PeerError as error:
            logger.debug("the channel to …%s has ended: %s", link.peer[-6:], error.message)
            if isinstance(error, PeerTimeout):
                # Nothing passes: a client that repeats its step must not wait for a dial again.
                self._break(link, channel)
            for on_lost in sent.lost(channel):
                # In tasks of their own: a client that does not read holds up no other's news.
                self._tasks.start(on_lost(), "report of a broken link")
        finally:
            if link.channel is channel:
                link.channel = None
            await channel.close()

    def _break(self, link: Link, channel: Channel) -> None:
        """The peer does not answer: no new channel for a moment."""
        link.broken_until = self._clock.monotonic() + self._limits.link_rest_seconds
        if link.channel is channel:
            link.channel = None

    def _is_idle(self, link: Link) -> bool:
        rested = self._clock.monotonic() - link.used_at >= link.idle_seconds
        return rested and not link.in_order.locked()


def _check_open(channel: Channel) -> None:
    """Raise PeerUnreachable for a channel that has ended while a message was being sent.

    The losses of the channel may have been reported by then, and this message was not among them.
    """
    if channel.is_closed:
        raise PeerUnreachable("The channel has ended.", peer_id=channel.peer_id)
