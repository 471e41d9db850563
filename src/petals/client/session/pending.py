"""What a path waits for: the answer to a step, or the end of a refill, and for how long.

Knows who may answer; knows no routes and nothing of what the answers mean.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from petals.client.session.hop import HopSession
from petals.client.session.input_log import ReplayBuffer
from petals.client.session.types import StepReply
from petals.clock import Clock, Timer
from petals.errors import PetalsError
from petals.types import Route

ReplyFrom = tuple[HopSession, StepReply | PetalsError | None]
"""Which hop spoke, and what: a result, a refusal, or None: it is refilled."""


@dataclass(frozen=True, slots=True)
class Refilling:
    """``num_tokens`` of a session's rows on their way into ``hops``, from the ``source`` that comes
    before them (None: from us). The hops need not be on the path yet. ``fetched``: we get the rows.
    """

    step_id: int
    source: HopSession | None
    hops: Sequence[HopSession]
    num_tokens: int
    fetched: ReplayBuffer | None = None

    @property
    def next_hops(self) -> Route:
        """Where the source hands on to."""
        hops = self.hops if self.source is not None else self.hops[1:]
        return tuple(hop.hop for hop in hops)

    @property
    def line(self) -> list[HopSession]:
        """Everybody whom the rows pass."""
        return [*(() if self.source is None else (self.source,)), *self.hops]


class PendingReply:
    """A step, or the end of a refill, whose answer may come from any of ``hops``.

    ``is_paced``: the pace of the route tells how long to wait, and may tell more while we do.
    ``reported_loss``: hops that have said, once, that their part of it may be lost.
    """

    def __init__(self, clock: Clock) -> None:
        self.hops: Sequence[HopSession] = ()
        self.refilling: Refilling | None = None
        self.reported_loss: set[HopSession] = set()
        self._clock = clock
        self.begin(is_paced=False)

    def begin(self, *, is_paced: bool) -> None:
        """Wait anew, from now on."""
        self.is_paced = is_paced
        self.heard: asyncio.Future[ReplyFrom | None] = asyncio.get_running_loop().create_future()
        self._began = self._clock.monotonic()
        self._timer: Timer | None = None

    async def hear(self, seconds: float) -> ReplyFrom | None:
        """What ``heard`` is set to; None after ``seconds``, or what ``limit`` makes of them."""
        self._end_after(seconds)
        try:
            return await self.heard
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def limit(self, seconds: float) -> None:
        """Wait no longer than ``seconds`` in all."""
        if self._timer is not None:
            self._timer.cancel()
            self._end_after(max(0.0, self._began + seconds - self._clock.monotonic()))

    def _end_after(self, seconds: float) -> None:
        self._timer = self._clock.call_later(seconds, self._end)

    def _end(self) -> None:
        if not self.heard.done():
            self.heard.set_result(None)
