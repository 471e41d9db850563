"""The KV memory of one server: a budget that sessions reserve from, and the rows that hold KV.

A session reserves all memory it may ever need when it opens, so that a generation never runs out of
memory half-way; memory itself is allocated only as rows grow. Knows no clients, no waiting and no
network: a refused caller decides what to do next (``admission.kv_queue`` lets it wait).
"""

import threading
from collections.abc import Sequence
from types import TracebackType

from petals.errors import CacheFull, LengthExceeded, RequestTooLarge, SessionClosed
from petals.models.runtime.kv_layout import KVLayout, SlabRow
from petals.types import BlockSpan


class KVPool:
    """All KV memory that a span may use.

    The rows of its sessions belong to the compute thread. Reservations are also made and returned
    on the event loop, so the accounts (and nothing else) are guarded by a lock.
    """

    def __init__(self, layout: KVLayout, budget_bytes: int) -> None:
        self.layout = layout
        self.budget_bytes = budget_bytes
        self._reserved_bytes = 0
        self._sessions: set[SessionKV] = set()
        self._lock = threading.Lock()

    @classmethod
    def for_tokens(cls, layout: KVLayout, num_tokens: int) -> "KVPool":
        """A pool for ``num_tokens`` tokens of one row in every block of the span."""
        return cls(layout, _row_bytes(layout, layout.span, num_tokens))

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes allocated by rows now; call it on the compute thread."""
        with self._lock:
            return sum(row.num_bytes for session in self._sessions for row in session.rows)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def tokens_total(self) -> int:
        """Tokens of one row, in all blocks of the span, that the whole budget is enough for."""
        return self._tokens_in(self.budget_bytes)

    @property
    def block_tokens_free(self) -> int:
        """Tokens of one row in one block, of the average size, that are not reserved."""
        num_bytes, span = self.budget_bytes - self._reserved_bytes, self.layout.span
        token_bytes = self.layout.token_bytes(span)
        if not token_bytes:
            return self._tokens_in(num_bytes) * len(span)
        return max(0, num_bytes - self.layout.state_bytes(span)) * len(span) // token_bytes

    def reserve(self, num_rows: int, max_length: int, blocks: BlockSpan) -> "SessionKV":
        """Reserve ``num_rows`` rows of up to ``max_length`` tokens in ``blocks``.

        Raises CacheFull (not enough is free now) or RequestTooLarge (the budget is too small). May
        be called on any thread.
        """
        session = SessionKV(self, blocks, max_length)
        session.rows = [SlabRow(blocks, max_length) for _ in range(num_rows)]
        self._book(session, num_rows, max_length)
        return session

    def release(self, session: "SessionKV") -> None:
        """Return a reservation; ``SessionKV.free`` on the compute thread must follow.

        May be called on any thread. Another session can be opened at once: the compute thread frees
        the old rows before it runs the first step of the new session, since orders keep their
        order.
        """
        with self._lock:
            self._sessions.discard(session)
            self._reserved_bytes -= session.reserved_bytes
            session.reserved_bytes = 0
            session.is_released = True

    def check_fits(self, num_rows: int, max_length: int, blocks: BlockSpan) -> None:
        """Raise RequestTooLarge for a request larger than the whole budget."""
        num_bytes = num_rows * _row_bytes(self.layout, blocks, max_length)
        if num_bytes > self.budget_bytes:
            raise RequestTooLarge(
                f"The request needs {_mib(num_bytes)} of cache, the server has "
                f"{_mib(self.budget_bytes)} in all.",
                hint="Ask for a smaller max_length or batch.",
            )

    def check_integrity(self) -> None:
        """Raise AssertionError if accounts and memory disagree.

        Call it on the compute thread between jobs; ``MemoryConfig.check_integrity`` lets the
        executor do so whenever it is idle.
        """
        with self._lock:
            self._check_accounts()

    def _check_accounts(self) -> None:
        booked = sum(session.reserved_bytes for session in self._sessions)
        _claim(booked == self._reserved_bytes, "reservations do not add up")
        _claim(0 <= self._reserved_bytes <= self.budget_bytes, "the budget is overdrawn")
        seen: set[int] = set()
        for session in self._sessions:
            rows = session.rows
            expected = len(rows) * _row_bytes(self.layout, session.blocks, session.max_length)
            _claim(session.reserved_bytes == expected, "a session's reservation is not its size")
            _claim(sum(r.num_bytes for r in rows) <= expected, "a session holds more than it has")
            for row in rows:
                _claim(0 <= row.length <= session.max_length, "a row is longer than its session")
                _claim(row.max_length == session.max_length, "a row has limits of its own")
                addresses = row.storages()
                _claim(not addresses & seen, "two rows share memory")
                seen |= addresses

    def _tokens_in(self, num_bytes: int) -> int:
        span = self.layout.span
        fixed = self.layout.state_bytes(span)
        token_bytes = self.layout.token_bytes(span)
        if not token_bytes:
            return num_bytes // fixed if fixed else num_bytes
        return max(0, num_bytes - fixed) // token_bytes

    def _book(self, session: "SessionKV", num_rows: int, max_length: int) -> None:
        """Change the reservation of ``session`` to that size, or raise and change nothing."""
        self.check_fits(num_rows, max_length, session.blocks)
        wanted = num_rows * _row_bytes(self.layout, session.blocks, max_length)
        with self._lock:
            if session.is_released:
                raise SessionClosed("The session's cache was released.")
            free = self.budget_bytes - self._reserved_bytes
            if wanted - session.reserved_bytes > free:
                raise CacheFull(
                    f"The request needs {_mib(wanted - session.reserved_bytes)} of cache, "
                    f"{_mib(free)} are free.",
                    hint="Wait for other sessions to end, or ask for a smaller max_length or "
                    "batch.",
                )
            self._reserved_bytes += wanted - session.reserved_bytes
            session.reserved_bytes = wanted
            self._sessions.add(session)


class SessionKV:
    """The KV rows of one session. ``free`` (or leaving it as a context manager) returns the memory.

    Belongs to the compute thread; the pool writes ``reserved_bytes`` and ``is_released``.
    """

    def __init__(self, pool: KVPool, blocks: BlockSpan, max_length: int) -> None:
        self.blocks = blocks
        self.max_length = max_length
        self.rows: list[SlabRow] = []
        self.reserved_bytes = 0
        self.is_released = False
        self._pool = pool
        self._closed = False

    @property
    def layout(self) -> KVLayout:
        """The memory layout of one token of a row."""
        return self._pool.layout

    def extend(self, max_length: int) -> None:
        """Allow rows of ``max_length`` tokens. Raises CacheFull or RequestTooLarge and changes
        nothing.
        """
        self._check_open()
        if max_length <= self.max_length:
            return
        self._pool._book(self, len(self.rows), max_length)
        self.max_length = max_length
        for row in self.rows:
            row.set_limit(max_length)

    def truncate(self, row: int, length: int) -> None:
        """Roll one row back to ``length`` tokens."""
        self._check_open()
        self.rows[row].truncate(length)

    def reorder(self, sources: Sequence[int]) -> None:
        """New row r continues old row ``sources[r]``; old rows not named are dropped.

        The number of rows may change: raises CacheFull or RequestTooLarge and changes nothing.
        """
        self._check_open()
        if any(not 0 <= source < len(self.rows) for source in sources):
            raise LengthExceeded(f"Rows {list(sources)} are not all among {len(self.rows)}.")
        # Booked before any row is touched: a refused reorder leaves the session as it was.
        self._pool._book(self, len(sources), self.max_length)
        try:
            self.rows, dropped = self._continued(sources)
        except BaseException:
            self._pool._book(self, len(self.rows), self.max_length)
            raise
        for row in dropped:
            row.release()

    def fork(self, source: "SessionKV", lengths: Sequence[int]) -> None:
        """Begin with copies of the rows of ``source``, another session of the same blocks, cut to
        ``lengths``. Raises SessionClosed if either of the two was freed.
        """
        self._check_open()
        source._check_open()
        self.rows = [
            row.fork(length, self.max_length)
            for row, length in zip(source.rows, lengths, strict=True)
        ]

    def _continued(self, sources: Sequence[int]) -> tuple[list[SlabRow], list[SlabRow]]:
        """The new rows of a reorder, and the old rows that none of them continues."""
        rows: list[SlabRow] = []
        moved: set[int] = set()
        for source in sources:
            # The first mention takes the old row over as it is, so that a beam with one successor
            # costs nothing. Each further mention gets a copy: both rows write the same positions
            # next, and a row writes its slabs in place.
            old = self.rows[source]
            rows.append(old.fork() if source in moved else old)
            moved.add(source)
        return rows, [row for index, row in enumerate(self.rows) if index not in moved]

    def free(self) -> None:
        """Return all memory. May be called repeatedly."""
        if self._closed:
            return
        self._closed = True
        self._pool.release(self)
        for row in self.rows:
            row.release()
        self.rows = []

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("The session's cache was freed.")

    def __enter__(self) -> "SessionKV":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()


def _row_bytes(layout: KVLayout, blocks: BlockSpan, max_length: int) -> int:
    return max_length * layout.token_bytes(blocks) + layout.state_bytes(blocks)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _claim(holds: bool, complaint: str) -> None:
    if not holds:
        raise AssertionError(complaint)
