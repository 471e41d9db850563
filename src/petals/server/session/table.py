"""All sessions of a server: opened once, found by client and id, drained, ended.

Knows no messages but those a server sends unasked, no steps and no blocks' insides.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from petals.clock import Clock
from petals.errors import PeerBusy
from petals.logs import get_logger
from petals.server.config import ClientLimits
from petals.server.session.session import ClientChannel, Session, SessionKey
from petals.swarm.background import BackgroundTasks
from petals.swarm.failover_config import FailoverConfig
from petals.types import PeerId
from petals.wire.replies import Draining, SessionEnded

logger = get_logger(__name__)

_MAX_REPETITIONS = 4
"""Requests for one session that may wait until it is opened."""


@dataclass(slots=True, eq=False)
class _Opening:
    """A session that is being opened: whose turn it is, and how many requests for it there are."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_requests: int = 0


class SessionTable:
    """All sessions of a server; ``close`` it."""

    def __init__(self, limits: ClientLimits, failover: FailoverConfig, clock: Clock) -> None:
        self._limits = limits
        self._failover = failover
        self._clock = clock
        self._sessions: dict[SessionKey, Session] = {}
        self._openings: dict[SessionKey, _Opening] = {}
        self._leaves_at: float | None = None
        self._notices = BackgroundTasks()
        self._endings = BackgroundTasks()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way in any session, and none is being opened or ended."""
        is_changing = bool(self._openings or len(self._endings))
        return not is_changing and all(session.is_idle for session in self)

    def get(self, key: SessionKey) -> Session | None:
        return self._sessions.get(key)

    @asynccontextmanager
    async def opening(self, key: SessionKey) -> AsyncIterator[None]:
        """The turn to look for a session and to ``add`` it if there is none.

        A request may come twice, also on two channels. Only one of them reserves; the others wait
        here and find its session, or reserve themselves if its client has given it up. Raises
        PeerBusy if the client has its share of sessions.
        """
        opening = self._openings.get(key)
        if opening is None:
            if key not in self._sessions:
                self._check_share(key.peer_id)
            opening = self._openings[key] = _Opening()
        elif opening.num_requests > _MAX_REPETITIONS:
            raise PeerBusy("This session is being opened already.", hint="Wait for the answer.")
        opening.num_requests += 1
        try:
            async with opening.turn:
                yield
        finally:
            opening.num_requests -= 1
            if not opening.num_requests:
                del self._openings[key]

    def add(self, session: Session) -> None:
        self._sessions[session.key] = session

    def attach(self, session: Session, client: ClientChannel) -> None:
        """The client of a session has given a sign of life on a channel."""
        if session.attach(client) and self._leaves_at is not None:
            self._announce_draining(session, self._leaves_at)

    async def end(self, session: Session, reason: str = "") -> None:
        """Close a session, free its memory and, with a reason, notify its client. Idempotent."""
        if self._sessions.get(session.key) is not session:
            return
        del self._sessions[session.key]
        # In a task of its own: a caller that is cancelled here, since its channel breaks, must not
        # leave memory behind that no session has any more.
        await asyncio.wait({self._endings.start(session.close(), "freeing a session")})
        if reason:
            # In a task of its own: a client that takes nothing holds up no other session's end.
            ended = partial(SessionEnded, reason=reason)
            self._notices.start(session.notify(ended), "notice of an ended session")

    async def end_silent(self) -> None:
        """End the sessions whose client gave no sign of life for longer than the lease."""
        for session in self:
            if session.silent_seconds > self._limits.lease_seconds:
                logger.info("session %s is freed: its client is silent", session.key)
                await self.end(session, "No sign of life for longer than the lease.")

    async def end_all(self, reason: str) -> None:
        """End every session and give the clients a moment to take the notice."""
        for session in self:
            await self.end(session, reason)
        await self._endings.wait(self._failover.parting_seconds)
        await self._notices.wait(self._failover.parting_seconds)

    async def drain(self, seconds: float) -> None:
        """Notify the clients that the server leaves, and wait until their sessions are gone.

        At most ``seconds``, and not for sessions whose client has no open channel.
        """
        self._leaves_at = leaves_at = self._clock.monotonic() + seconds
        for session in self:
            self._announce_draining(session, leaves_at)
        while self._clock.monotonic() < leaves_at and any(s.has_client for s in self):
            await self._clock.sleep(self._failover.drain_look_seconds)

    async def finish(self, timeout_seconds: float) -> None:
        """Let requests that are under way end, for at most ``timeout_seconds``."""
        await asyncio.gather(*(session.finish(timeout_seconds) for session in self))

    async def close(self) -> None:
        """Drop the notices that were not taken yet."""
        await self._notices.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if sessions contradict each other or themselves; while idle only."""
        rows = [id(row) for session in self for row in session.rows.kv.rows]
        if len(rows) != len(set(rows)):
            raise AssertionError("two sessions share KV rows")
        for key, session in self._sessions.items():
            if session.key != key:
                raise AssertionError("a session is filed under another's key")
            session.check_integrity()

    def _check_share(self, peer: PeerId) -> None:
        keys = self._sessions.keys() | self._openings.keys()
        if sum(key.peer_id == peer for key in keys) >= self._limits.max_sessions_per_peer:
            raise PeerBusy(
                f"A client may keep {self._limits.max_sessions_per_peer} sessions open here.",
                hint="Close some, or use another server.",
            )

    def _announce_draining(self, session: Session, leaves_at: float) -> None:
        seconds = max(0.0, leaves_at - self._clock.monotonic())
        draining = partial(Draining, seconds=seconds)
        self._notices.start(session.notify(draining), "notice of draining")
