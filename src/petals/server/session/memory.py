"""The memory that all sessions of a server share: keys and values, and logs of outputs.

Knows no clients and no waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from petals.models.runtime.token_log import LogBudget
from petals.server.compute.kv_pool import KVPool
from petals.server.session.session import Session


@dataclass(slots=True)
class SessionMemory:
    """``pool`` belongs to the compute thread, ``logs`` to the event loop.

    When the budget of the logs is spent, the log of the session that was opened first is dropped as
    a whole: that session goes on, but cannot be replayed from here.
    """

    pool: KVPool
    logs: LogBudget
    is_checked: bool = False
    """Whether the server compares the books with the memory whenever it is idle."""
    failure: AssertionError | None = None
    """What the event loop has found wrong. The compute thread raises it, which ends the server."""

    def check_when_idle(self) -> None:
        """For the compute thread: raise AssertionError if the books are wrong."""
        if self.failure is not None:
            raise self.failure
        self.pool.check_integrity()

    def check_pool(self) -> int:
        """Raise AssertionError if the pool is in disorder. Returns the number of reservations."""
        self.pool.check_integrity()
        return self.pool.num_sessions

    def check_logs(self, sessions: Sequence[Session]) -> None:
        """Raise AssertionError unless the logs' budget counts exactly those of ``sessions``."""
        num_bytes = sum(session.rows.outputs.num_bytes for session in sessions)
        if num_bytes != self.logs.used_bytes or num_bytes > self.logs.max_bytes:
            raise AssertionError(
                f"logs hold {num_bytes} bytes, {self.logs.used_bytes} are counted, "
                f"{self.logs.max_bytes} are allowed"
            )
