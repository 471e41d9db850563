"""Long-lived channels to the servers that our outputs go on to, shared by all sessions.

A lane is one channel to one peer: the common one for steps, and one of its own for each replay,
whose back-pressure must not hold up other people's words. What is sent on a lane arrives in order;
a lane that breaks tells whose words may have gone down with it. Knows peers and messages; knows no
sessions and no steps.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from torch import Tensor

from petals.clock import Clock
from petals.errors import PeerBusy, PeerError, PeerTimeout, PeerUnreachable, PetalsError
from petals.logs import get_logger
from petals.swarm.background import BackgroundTasks
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.services import RING_SERVICE

logger = get_logger(__name__)

MAX_LANES = 512
SILENCE_SECONDS = 3.0
"""A next hop that gives no sign of life for so long is cut off from us."""
MAX_UNCONFIRMED = 1024
"""Messages of a lane that are remembered until the next pong; one goes out every second."""
_DIAL_SECONDS = 3.0
_REST_SECONDS = 1.0
"""A lane that could not be dialled counts as broken for so long: those in line do not dial, too."""
_IDLE_SECONDS = 600.0
_IDLE_REPLAY_SECONDS = 10.0

OpenChannel = Callable[[PeerId, str, float], Awaitable[Channel]]
OnLost = Callable[[], Coroutine[Any, Any, None]]


class Link:
    """One channel to ``peer``, when there is one."""

    def __init__(self, peer: PeerId, idle_seconds: float) -> None:
        self.peer = peer
        self.idle_seconds = idle_seconds
        self.channel: Channel | None = None
        self.in_order = asyncio.Lock()
        self.used_at = 0.0
        self.broken_until = 0.0
        self.sent = UnackedSends()

    @property
    def is_in_use(self) -> bool:
        return self.channel is not None or self.in_order.locked()


class UnackedSends:
    """What was sent on a channel and may not have arrived: when, and whom to tell in that case."""

    def __init__(self) -> None:
        self._unconfirmed: deque[tuple[float, OnLost]] = deque(maxlen=MAX_UNCONFIRMED)

    def note(self, now: float, on_lost: OnLost, channel: Channel) -> None:
        self._unconfirmed.append((now, on_lost))
        while self._unconfirmed[0][0] < channel.confirmed_at:
            self._unconfirmed.popleft()

    def lost(self, channel: Channel) -> list[OnLost]:
        """Whom to tell, in the order in which they sent."""
        return [told for sent_at, told in self._unconfirmed if sent_at >= channel.confirmed_at]


class PeerLinks:
    """The lanes of one server; ``close`` them."""

    def __init__(self, open_channel: OpenChannel, clock: Clock) -> None:
        self._open_channel = open_channel
        self._clock = clock
        self._lanes: dict[tuple[PeerId, bytes], Link] = {}
        self._tasks = BackgroundTasks()

    @property
    def num_open(self) -> int:
        """Channels that are open now."""
        return sum(lane.channel is not None for lane in self._lanes.values())

    async def close(self) -> None:
        """End all channels."""
        await self._tasks.close()
        self._lanes.clear()

    def meet(self, peer: PeerId) -> None:
        """Open the common lane to ``peer`` in good time, if there is none and there may be one."""
        with contextlib.suppress(PeerBusy):
            lane = self._lane(peer, b"")
            if not lane.is_in_use:
                self._tasks.start(self._open(lane), "meeting a next hop")

    async def send(
        self,
        peer: PeerId,
        message: Message,
        tensors: Sequence[Tensor],
        on_lost: OnLost,
        *,
        replay_of: bytes = b"",
    ) -> None:
        """Send on the common lane, or on that of a replayed session.

        Dials if need be, and again, once, if the channel is found broken. ``on_lost`` is called if
        the lane breaks later and the message may not have arrived. Raises PeerError or
        RequestTooLarge.
        """
        lane = self._lane(peer, replay_of)
        async with lane.in_order:
            for is_last_try in (lane.channel is None, True):
                channel = lane.channel or await self._dial(lane)
                try:
                    await channel.send(message, tensors)
                    lane.used_at = self._clock.monotonic()
                    lane.sent.note(lane.used_at, on_lost, channel)
                    return
                except PeerError:
                    lane.channel = None
                    if is_last_try:
                        raise

    def _lane(self, peer: PeerId, replay_of: bytes) -> Link:
        key = (peer, replay_of)
        if key not in self._lanes:
            if len(self._lanes) >= MAX_LANES:
                self._lanes = {k: lane for k, lane in self._lanes.items() if lane.is_in_use}
            if len(self._lanes) >= MAX_LANES:
                raise PeerBusy("This server hands on to too many others.", peer_id=peer)
            self._lanes[key] = Link(peer, _IDLE_REPLAY_SECONDS if replay_of else _IDLE_SECONDS)
        return self._lanes[key]

    async def _open(self, lane: Link) -> None:
        async with lane.in_order:
            with contextlib.suppress(PeerError):
                if lane.channel is None:
                    await self._dial(lane)

    async def _dial(self, lane: Link) -> Channel:
        if self._clock.monotonic() < lane.broken_until:
            raise PeerUnreachable("The peer did not answer a moment ago.", peer_id=lane.peer)
        try:
            channel = await self._open_channel(lane.peer, RING_SERVICE, _DIAL_SECONDS)
        except PetalsError as error:
            lane.broken_until = self._clock.monotonic() + _REST_SECONDS
            reason = f"No channel to the next hop: {error.message}"
            raise PeerUnreachable(reason, peer_id=lane.peer) from error
        channel.silence_seconds = SILENCE_SECONDS
        lane.channel, lane.used_at = channel, self._clock.monotonic()
        lane.sent = UnackedSends()
        self._tasks.start(self._listen(lane, channel, lane.sent), "listening to a next hop")
        return channel

    async def _listen(self, lane: Link, channel: Channel, sent: UnackedSends) -> None:
        """The life of a channel: nothing is said on it but refusals; long idleness ends it."""
        try:
            while not self._is_idle(lane):
                try:
                    answer, _ = await channel.receive(lane.idle_seconds)
                except PeerTimeout:
                    if channel.is_closed:
                        raise
                    continue
                if isinstance(answer, Refusal):
                    logger.info("…%s refused a step: %s", lane.peer[-6:], answer.message)
        except PeerError as error:
            logger.debug("the channel to …%s has ended: %s", lane.peer[-6:], error.message)
            if isinstance(error, PeerTimeout):
                # Nothing passes: whoever is told of a loss need not find that out by dialling.
                lane.broken_until = self._clock.monotonic() + _REST_SECONDS
            for on_lost in sent.lost(channel):  # a client that does not read holds up no other
                self._tasks.start(on_lost(), "telling what broke with a lane")
        finally:
            if lane.channel is channel:
                lane.channel = None
            await channel.close()

    def _is_idle(self, lane: Link) -> bool:
        rested = self._clock.monotonic() - lane.used_at >= lane.idle_seconds
        return rested and not lane.in_order.locked()
