"""Keeps our entry in the directory alive and true.

Every change is announced at once, everything else is repeated before it expires. Knows the
directory; knows neither sessions nor models beyond their names.
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
_GOODBYE_SECONDS = 2.0
"""Peers that left before us must not hold us up; without it the record simply expires."""


class Announcer:
    """Speaks for one server from JOINING until it is closed, which says OFFLINE.

    An async context manager. A record that could not be stored is tried again soon.
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
        self._speaking = asyncio.Lock()

    async def __aenter__(self) -> "Announcer":
        await self.announce()
        self._tasks.start(self._repeat(), "announcing")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self.announce(state=ServerState.OFFLINE)

    async def announce(self, **changes: object) -> bool:
        """Change fields of the record and store it now. True if somebody took it."""
        self.record = msgspec.structs.replace(self.record, **changes)
        async with self._speaking:
            expires_at = self._clock.now() + self._config.expiry_seconds
            fresh = msgspec.structs.replace(self.record, expires_at=expires_at)
            return await self._directory.announce(fresh, self._repository)

    async def say(self, state: ServerState, moves_to: BlockSpan | None = None) -> None:
        """Announce a state without waiting long for anybody: peers may be leaving, too.

        A server that moves tells where to, so that nobody else goes there for the same reason.
        """
        spans = () if moves_to is None else ((moves_to.start, moves_to.end),)
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self.announce(state=state, next_spans=spans)
        except TimeoutError:
            logger.info("Not every peer has heard that this server is %s.", state)

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
