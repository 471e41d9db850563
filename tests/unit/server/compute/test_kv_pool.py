import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from petals.errors import CacheFull, LengthExceeded, RequestTooLarge, SessionClosed
from petals.models.runtime.kv_layout import BlockLayout, KVLayout
from petals.server.compute.kv_pool import KVPool, SessionKV
from petals.types import BlockSpan

SPAN = BlockSpan(4, 7)
LAYOUT = KVLayout(
    span=SPAN,
    blocks=(
        BlockLayout(key_shape=(2, 4), value_shape=(2, 4)),
        BlockLayout(key_shape=(1, 6), value_shape=(1, 2)),
        BlockLayout(),
    ),
)


def write(session: SessionKV, row: int, count: int, mark: float) -> None:
    kept = session.rows[row]
    for block in range(session.blocks.start, session.blocks.end):
        layout = LAYOUT.of(block)
        (key_heads, key_width), (value_heads, value_width) = layout.key_shape, layout.value_shape
        if key_heads:
            key = torch.full((key_heads, count, key_width), mark)
            value = torch.full((value_heads, count, value_width), -mark)
            kept.append(block, kept.length, key, value)
    kept.commit(kept.length + count)


def marks(session: SessionKV, row: int) -> list[float]:
    """What is written at each position of one row."""
    kept = session.rows[row]
    layout = LAYOUT.of(session.blocks.start)
    (key_heads, key_width), (value_heads, value_width) = layout.key_shape, layout.value_shape
    no_key = torch.empty((key_heads, 0, key_width))
    no_value = torch.empty((value_heads, 0, value_width))
    keys, values = kept.append(session.blocks.start, kept.length, no_key, no_value)
    assert torch.equal(keys[0, :, 0], -values[0, :, 0])
    return keys[0, :, 0].tolist()


def test_a_reservation_takes_exactly_its_tokens_in_its_blocks() -> None:
    pool = KVPool.for_tokens(LAYOUT, 160)
    whole, part = LAYOUT.token_bytes(SPAN), LAYOUT.token_bytes(BlockSpan(5, 6))
    with pool.reserve(2, 17, SPAN), pool.reserve(1, 1, BlockSpan(5, 6)):
        assert pool.reserved_bytes == 2 * 17 * whole + part
    assert pool.block_tokens_free == 3 * pool.tokens_total == 3 * 160


def test_free_tokens_are_counted_to_the_token() -> None:
    blocks = (BlockLayout(key_shape=(1, 4), value_shape=(1, 4)),) * 5
    pool = KVPool.for_tokens(KVLayout(span=BlockSpan(2, 7), blocks=blocks), 1000)
    with pool.reserve(1, 100, BlockSpan(2, 5)):
        assert pool.block_tokens_free == 5 * 1000 - 3 * 100
        with pool.reserve(2, 50, BlockSpan(6, 7)):
            assert pool.block_tokens_free == 5 * 1000 - 3 * 100 - 2 * 50


def test_full_is_not_the_same_as_too_large() -> None:
    pool = KVPool.for_tokens(LAYOUT, 64)
    with pool.reserve(1, 48, SPAN):
        with pytest.raises(CacheFull) as full:
            pool.reserve(1, 32, SPAN)
        with pytest.raises(RequestTooLarge) as large:
            pool.reserve(1, 80, SPAN)
        assert full.value.retryable and not large.value.retryable
        assert full.value.hint and large.value.hint
        pool.check_integrity()
    pool.reserve(1, 64, SPAN).free()
    assert pool.num_sessions == 0


def test_memory_follows_use_up_to_the_reservation() -> None:
    pool = KVPool.for_tokens(LAYOUT, 4096)
    session = pool.reserve(1, 1000, SPAN)
    assert pool.used_bytes == 0
    write(session, 0, 5, 1.0)
    early = pool.used_bytes
    assert 0 < early < pool.reserved_bytes / 8
    write(session, 0, 995, 2.0)
    assert early < pool.used_bytes <= pool.reserved_bytes
    assert marks(session, 0) == [1.0] * 5 + [2.0] * 995
    session.free()
    assert pool.used_bytes == 0


def test_a_reorder_names_rows_there_are_and_a_freed_session_has_none() -> None:
    session = KVPool.for_tokens(LAYOUT, 100).reserve(1, 10, SPAN)
    with pytest.raises(LengthExceeded):
        session.reorder([1])
    session.free()
    session.free()
    with pytest.raises(SessionClosed):
        session.reorder([0])
    with pytest.raises(SessionClosed):
        session.extend(11)


def test_a_session_that_was_freed_is_not_forked() -> None:
    pool = KVPool.for_tokens(LAYOUT, 64)
    with pool.reserve(1, 16, SPAN) as fork:
        source = pool.reserve(1, 16, SPAN)
        source.free()
        with pytest.raises(SessionClosed):
            fork.fork(source, (0,))


def test_recurrent_states_are_paid_for() -> None:
    layout = KVLayout(span=BlockSpan(0, 1), blocks=(BlockLayout(state_bytes=1000),), input_bytes=8)
    pool = KVPool(layout, budget_bytes=6000)
    with pool.reserve(1, 16, BlockSpan(0, 1)):
        assert pool.reserved_bytes == 5 * 1000 + 16 * 8
        with pytest.raises(CacheFull):
            pool.reserve(1, 16, BlockSpan(0, 1))


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of operations; a model of plain lists says what each row must hold."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool.for_tokens(LAYOUT, 320)
        self.expected: dict[SessionKV, list[list[float]]] = {}
        self.mark = 0.0

    @rule(
        target=sessions,
        num_rows=st.integers(1, 4),
        max_length=st.integers(1, 200),
        start=st.integers(4, 5),
        end=st.integers(5, 7),
    )
    def reserve(self, num_rows: int, max_length: int, start: int, end: int) -> SessionKV | None:
        if start >= end:
            return None
        try:
            session = self.pool.reserve(num_rows, max_length, BlockSpan(start, end))
        except (CacheFull, RequestTooLarge):
            return None
        self.expected[session] = [[] for _ in range(num_rows)]
        return session

    @rule(session=sessions, row=st.integers(0, 3), count=st.integers(1, 70))
    def write(self, session: SessionKV | None, row: int, count: int) -> None:
        if session is None or row >= len(session.rows):
            return
        self.mark += 1.0
        held = self.expected[session][row]
        if len(held) + count > session.max_length:
            with pytest.raises(LengthExceeded):
                write(session, row, count, self.mark)
            return
        write(session, row, count, self.mark)
        held.extend([self.mark] * count)

    @rule(session=sessions, row=st.integers(0, 3), share=st.floats(0, 1))
    def truncate(self, session: SessionKV | None, row: int, share: float) -> None:
        if session is None or row >= len(session.rows):
            return
        held = self.expected[session][row]
        kept = int(len(held) * share)
        session.truncate(row, kept)
        del held[kept:]

    @rule(session=sessions, picks=st.lists(st.integers(0, 3), min_size=1, max_size=5))
    def reorder(self, session: SessionKV | None, picks: list[int]) -> None:
        if session is None:
            return
        before, sources = session.rows, [pick % len(session.rows) for pick in picks]
        try:
            session.reorder(sources)
        except (CacheFull, RequestTooLarge):
            assert session.rows is before
            return
        # A row with one successor is moved, not copied.
        assert session.rows[0] is before[sources[0]]
        held = self.expected[session]
        self.expected[session] = [list(held[source]) for source in sources]

    @rule(session=sessions, more=st.integers(0, 60))
    def extend(self, session: SessionKV | None, more: int) -> None:
        if session is not None:
            try:
                session.extend(session.max_length + more)
            except (CacheFull, RequestTooLarge):
                return

    @rule(
        target=sessions,
        source=sessions,
        max_length=st.integers(0, 80),
        share=st.floats(0, 1),
    )
    def fork(self, source: SessionKV | None, max_length: int, share: float) -> SessionKV | None:
        if source is None:
            return None
        lengths = [int(len(row) * share) for row in self.expected[source]]
        max_length = max(max_length, *lengths)
        try:
            session = self.pool.reserve(len(lengths), max_length, source.blocks)
        except (CacheFull, RequestTooLarge):
            return None
        session.fork(source, lengths)
        held = zip(self.expected[source], lengths)
        self.expected[session] = [row[:length] for row, length in held]
        return session

    @rule(session=consumes(sessions))
    def free(self, session: SessionKV | None) -> None:
        if session is not None:
            session.free()
            del self.expected[session]

    @invariant()
    def accounts_and_contents_are_right(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used_bytes <= self.pool.reserved_bytes
        assert self.pool.num_sessions == len(self.expected)
        for session, held in self.expected.items():
            assert [row.length for row in session.rows] == [len(row) for row in held]
            for row, expected in enumerate(held):
                if expected:
                    assert marks(session, row) == expected


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


@given(num_tokens=st.integers(1, 500))
def test_what_is_said_to_be_free_can_be_reserved(num_tokens: int) -> None:
    pool = KVPool.for_tokens(LAYOUT, num_tokens)
    pool.reserve(1, pool.block_tokens_free // len(SPAN), SPAN).free()
    assert pool.block_tokens_free >= len(SPAN) * num_tokens
