"""Keeps this server's record in the directory alive and up to date.

Every change is announced at once; without changes the record is repeated before it expires. Knows
the directory; knows neither sessions nor models beyond their names.
"""

import asyncio
import contextlib

import msgspec

from petals.clock import Clock
from petals.logs import get_logger
from petals.server.config import AnnounceConfig
from petals.swarm.background import BackgroundTasks
from petals.swarm.directory.directory import Directory
from petals.swarm.directory.records import ServerRecord
from petals.types import BlockSpan, ServerState

logger = get_logger(__name__)
_RETRY_SECONDS = 3.0
"""Time between two attempts to store a record that no peer has taken."""

_LEAVE_SECONDS = 2.0
"""Longest time for announcing that the server leaves: the peers that store its record may be gone.
Without the announcement the record expires.
"""


class Announcer:
    """Announces one server from JOINING (on entering it, an async context manager) to OFFLINE (on
    leaving it). A record that could not be stored is tried again after 3 s.
    """

    def __init__(
        self,
        directory: Directory,
        record: ServerRecord,
        repository: str,
        config: AnnounceConfig,
        clock: Clock,
    ) -> None:
        self.record = record
        self._directory = directory
        self._repository = repository
        self._config = config
        self._clock = clock
        self._tasks = BackgroundTasks()
        self._announcing = asyncio.Lock()

    async def __aenter__(self) -> "Announcer":
        await self.announce()
        self._tasks.start(self._repeat(), "announcing")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self.announce(state=ServerState.OFFLINE)

    async def announce(self, **changes: object) -> bool:
        """Change fields of the record and store it now. True if at least one peer took it."""
        self.record = msgspec.structs.replace(self.record, **changes)
        async with self._announcing:
            expires_at = self._clock.now() + self._config.expiry_seconds
            fresh = msgspec.structs.replace(self.record, expires_at=expires_at)
            return await self._directory.announce(fresh, self._repository)

    async def announce_state(self, state: ServerState, moves_to: BlockSpan | None = None) -> None:
        """Announce a state, for at most 2 s.

        ``moves_to``: the next blocks of a server that moves; other servers count it there already,
        and do not move for the same reason.
        """
        spans = () if moves_to is None else ((moves_to.start, moves_to.end),)
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self.announce(state=state, next_spans=spans)
        except TimeoutError:
            logger.info("Not every peer could be informed that this server is %s.", state)

    async def _repeat(self) -> None:
        period = self._config.period_seconds
        pause = period
        while True:
            await self._clock.sleep(pause)
            if await self.announce():
                pause = period
            else:
                pause = min(period, _RETRY_SECONDS)
                logger.warning("No peer takes our announcement; trying again in %g s.", pause)
