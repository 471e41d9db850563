"""The KV memory of one server: a budget in pages, reserved by sessions, held in slabs.

A page is ``PAGE_TOKENS`` tokens of one row in one block. A session reserves all pages it may ever
need when it opens, so a generation never runs out in the middle; memory itself is taken from the
machine only as rows grow. Knows no clients, no waiting and no network: who is refused decides what
to do next.
"""

from collections.abc import Sequence
from types import TracebackType

from petals.errors import CacheFull, LengthExceeded, RequestTooLarge, SessionClosed
from petals.models.runtime.kv_layout import KVLayout, SlabRow
from petals.types import BlockSpan

PAGE_TOKENS = 16


class KVPool:
    """All KV memory a span may use. Not thread-safe: it belongs to the compute thread's owner."""

    def __init__(self, layout: KVLayout, budget_bytes: int) -> None:
        self.layout = layout
        self.budget_bytes = budget_bytes
        self._reserved_bytes = 0
        self._sessions: set[SessionKV] = set()

    @classmethod
    def for_tokens(cls, layout: KVLayout, num_tokens: int) -> "KVPool":
        """A pool with room for ``num_tokens`` tokens of one row in every block of the span."""
        return cls(layout, _row_bytes(layout, layout.span, num_tokens))

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def used_bytes(self) -> int:
        """Memory really held by rows now."""
        return sum(row.num_bytes for session in self._sessions for row in session.rows)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def tokens_total(self) -> int:
        """Tokens of one row, in all blocks of the span, that an empty pool has room for."""
        return self._tokens_in(self.budget_bytes)

    @property
    def tokens_free(self) -> int:
        """The same for what is not reserved now."""
        return self._tokens_in(self.budget_bytes - self._reserved_bytes)

    def reserve(self, num_rows: int, max_length: int, blocks: BlockSpan) -> "SessionKV":
        """Room for ``num_rows`` rows of up to ``max_length`` tokens in ``blocks``.

        Raises CacheFull (later it may fit) or RequestTooLarge (it never will).
        """
        session = SessionKV(self, blocks, max_length)
        session._resize(num_rows, max_length)
        session.rows = [SlabRow(blocks, max_length) for _ in range(num_rows)]
        self._sessions.add(session)
        return session

    def check_integrity(self) -> None:
        """Raise AssertionError if accounts and memory disagree. For tests and self-checks."""
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
        page_bytes = PAGE_TOKENS * self.layout.token_bytes(span)
        if page_bytes == 0:
            return num_bytes // fixed if fixed else num_bytes
        return max(0, num_bytes - fixed) // page_bytes * PAGE_TOKENS

    def _book(self, change_bytes: int, total_bytes: int) -> None:
        """Change the reservations, or raise and change nothing. ``total_bytes``: all it needs."""
        if total_bytes > self.budget_bytes:
            raise RequestTooLarge(
                f"The request needs {_mib(total_bytes)} of cache, the server has "
                f"{_mib(self.budget_bytes)} in all.",
                hint="Ask for a smaller max_length or batch.",
            )
        free = self.budget_bytes - self._reserved_bytes
        if change_bytes > free:
            raise CacheFull(
                f"The request needs {_mib(change_bytes)} of cache, {_mib(free)} are free.",
                hint="Wait for other sessions to end, or ask for a smaller max_length or batch.",
            )
        self._reserved_bytes += change_bytes

    def _forget(self, session: "SessionKV") -> None:
        self._sessions.discard(session)
        self._reserved_bytes -= session.reserved_bytes


class SessionKV:
    """The rows of one session. Closing it (also as a context manager) returns its memory."""

    def __init__(self, pool: KVPool, blocks: BlockSpan, max_length: int) -> None:
        self.blocks = blocks
        self.max_length = max_length
        self.rows: list[SlabRow] = []
        self.reserved_bytes = 0
        self._pool = pool
        self._closed = False

    @property
    def layout(self) -> KVLayout:
        """What one token of a row is in memory."""
        return self._pool.layout

    def extend(self, max_length: int) -> None:
        """Allow longer rows. Raises CacheFull or RequestTooLarge and changes nothing."""
        self._check_open()
        if max_length <= self.max_length:
            return
        self._resize(len(self.rows), max_length)
        self.max_length = max_length
        for row in self.rows:
            row.set_limit(max_length)

    def truncate(self, row: int, length: int) -> None:
        """Roll one row back to ``length`` tokens."""
        self._check_open()
        self.rows[row].truncate(length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row r of the new rows continues old row ``sources[r]``.

        Old rows named once are moved, further mentions are copied, the rest are dropped. The
        number of rows may change: raises CacheFull or RequestTooLarge and changes nothing.
        """
        self._check_open()
        if any(not 0 <= source < len(self.rows) for source in sources):
            raise LengthExceeded(f"Rows {list(sources)} are not all among {len(self.rows)}.")
        self._resize(len(sources), self.max_length)
        old, moved = self.rows, set[int]()
        self.rows = []
        for source in sources:
            self.rows.append(old[source].fork() if source in moved else old[source])
            moved.add(source)
        for index, row in enumerate(old):
            if index not in moved:
                row.release()

    def free(self) -> None:
        """Return all memory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._pool._forget(self)
        for row in self.rows:
            row.release()
        self.rows = []
        self.reserved_bytes = 0

    def _resize(self, num_rows: int, max_length: int) -> None:
        wanted = num_rows * _row_bytes(self._pool.layout, self.blocks, max_length)
        self._pool._book(wanted - self.reserved_bytes, wanted)
        self.reserved_bytes = wanted

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
    num_pages = -(-max_length // PAGE_TOKENS)
    return num_pages * PAGE_TOKENS * layout.token_bytes(blocks) + layout.state_bytes(blocks)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _claim(holds: bool, complaint: str) -> None:
    if not holds:
        raise AssertionError(complaint)
