"""What transformers does to the cache is recorded by the session and sent with its next step."""

import pytest
import torch
from transformers import Cache

from petals.client.config import ClientConfig
from petals.client.model.inference_session import InferenceSession
from petals.client.model.padding import ColumnLayout, read_columns
from petals.client.model.session_cache import SessionCache
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import BadInput, NotSupported, SessionClosed, SessionGap
from petals.types import BlockSpan

MANAGER = RemoteSequenceManager(ClientConfig(dht_prefix="recorded"), BlockSpan(0, 2))


class RecordedRows:
    """Rows that return their input and record the steps."""

    def __init__(self, access, blocks, *, max_length=None, num_rows=None, tuning=None):
        self.blocks, self.max_length, self.lengths = blocks, max_length, ()
        self.steps, self.is_closed, self.error = [], False, None

    @property
    def is_open(self):
        return not self.is_closed

    async def step(self, hidden, starts, counts, reorder=None, rope_lengths=None):
        if self.error is not None:
            raise self.error
        self.steps.append((starts, counts, reorder))
        self.lengths = tuple(start + count for start, count in zip(starts, counts))
        return hidden

    async def close(self):
        self.is_closed = True


class Opener:
    """Opens sessions and keeps what they send."""

    def __init__(self):
        self.lengths, self.rows = [], []

    def __call__(self, max_length=None):
        self.lengths.append(max_length)
        return InferenceSession(MANAGER, max_length, open_rows=self.open_rows)

    def open_rows(self, *args, **kwargs):
        self.rows.append(RecordedRows(*args, **kwargs))
        return self.rows[-1]

    @property
    def steps(self):
        (rows,) = self.rows
        return rows.steps


@pytest.fixture
def opener():
    return Opener()


@pytest.fixture
def cache(opener):
    return SessionCache(opener)


def run(cache, num_rows, num_columns, **told):
    session, hidden = cache.open(), torch.randn(num_rows, num_columns, 4)
    layout = ColumnLayout(num_rows=num_rows, num_columns=num_columns, **told)
    return session.step_columns(hidden, read_columns(session.columns, layout))


@pytest.mark.parametrize(("grows", "length"), [(True, None), (False, 9)])
def test_opens_once_with_the_length_asked_for_first(opener, grows, length):
    cache = SessionCache(opener, grows=grows)
    assert (cache.get_max_length(), cache.columns.num_rows) == (-1, 0)
    cache.open(9)
    run(cache, 2, 3)
    cache.open(20)
    assert opener.lengths == [length]
    assert cache.get_max_length() == (length or -1)


def test_answers_like_a_cache(cache):
    assert isinstance(cache, Cache)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    run(cache, 2, 3)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (3, 2, True)
    assert cache.get_mask_sizes(2, 0) == (5, 0)
    assert cache.get_mask_sizes(2, 7) == (5, 0)
    assert cache.get_query_offset() == 3
    assert cache.has_previous_state(0)
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.is_sliding == [False]
    assert cache.layers[0].get_seq_length() == 3
    assert cache.layers[0].get_mask_sizes(1) == (4, 0)


def test_holds_no_tensors(cache):
    state = torch.zeros(1, 1, 1, 1)
    with pytest.raises(NotSupported, match="stay on the servers"):
        cache.update(state, state, 0)


def order(*rows):
    return lambda cache: cache.reorder_cache(torch.tensor(rows))


def select(*rows):
    return lambda cache: cache.batch_select_indices(torch.tensor(rows))


@pytest.mark.parametrize(
    ("changes", "starts", "sent"),
    [
        ([lambda cache: cache.crop(-2)], (3, 3, 3), None),
        ([lambda cache: cache.crop(0)], (5, 5, 5), None),
        ([SessionCache.reset], (0, 0, 0), None),
        ([order(0, 1, 2)], (5, 5, 5), None),
        ([order(1, 0, 2), order(1, 0, 2)], (5, 5, 5), None),
        ([select(True, False, True)], (5, 5), (0, 2)),
        (
            [order(2, 0, 1), select(0, 2), lambda cache: cache.batch_repeat_interleave(2)],
            (5, 5, 5, 5),
            (2, 2, 1, 1),
        ),
    ],
    ids=["crop", "no-crop", "reset", "no-order", "undone", "mask", "forks-add-up"],
)
def test_changes_ride_on_the_next_step_alone(cache, opener, changes, starts, sent):
    run(cache, 3, 5)
    for change in changes:
        change(cache)
    assert (cache.get_seq_length(), cache.batch_size) == (starts[0], len(starts))
    assert len(opener.steps) == 1
    for number in range(2):
        run(cache, len(starts), 1)
        ones = (1,) * len(starts)
        expected = tuple(start + number for start in starts)
        assert opener.steps[-1] == (expected, ones, None if number else sent)


def test_changes_that_cannot_be(cache):
    run(cache, 3, 2)
    with pytest.raises(BadInput, match="not all among"):
        select(5)(cache)
    with pytest.raises(BadInput, match="negative"):
        cache.crop(3)
    with pytest.raises(BadInput, match="2 rows, its session has 3"):
        run(cache, 2, 1)


def test_padding_moves_with_its_row(cache, opener):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    outputs = run(cache, 2, 3, attention_mask=mask)
    assert not outputs[0, 0].any()
    assert opener.steps[-1] == ((0, 0), (2, 3), None)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    grown = torch.tensor([[1, 1, 1], [0, 1, 1]])
    run(cache, 2, 1, attention_mask=grown)
    assert opener.steps[-1] == ((2, 1), (1, 1), (1, 0))


def test_an_error_changes_nothing(cache, opener):
    run(cache, 2, 2)
    cache.reorder_cache(torch.tensor([1, 1]))
    opener.rows[0].error = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        run(cache, 2, 1)
    opener.rows[0].error = None
    assert cache.get_seq_length() == 2
    run(cache, 2, 1)
    assert opener.steps[-1] == ((2, 2), (1, 1), (1, 1))


def test_closing(cache, opener):
    with cache:
        run(cache, 1, 2)
    assert opener.rows[0].is_closed
    with pytest.raises(SessionClosed) as refusal:
        run(cache, 1, 1)
    assert "inference_session" in refusal.value.hint


def test_a_cache_without_steps_forks_nothing(cache, opener):
    cache.batch_repeat_interleave(3)
    cache.crop(-1)
    cache.open()
    cache.batch_repeat_interleave(3)
    run(cache, 2, 1)
    assert opener.steps == [((0, 0), (1, 1), None)]


class TestOfAnOpenSession:
    @pytest.fixture
    def session(self, opener):
        return opener()

    def test_is_the_same_for_the_same_session(self, session):
        assert SessionCache.of(session) is SessionCache.of(session) is session.past_key_values

    def test_sees_a_position_set_back(self, session, opener):
        cache = SessionCache.of(session)
        run(cache, 1, 5)
        session.position = 2
        assert cache.get_seq_length() == 2
        run(cache, 1, 1)
        assert opener.steps[-1] == ((2,), (1,), None)
        with pytest.raises(SessionGap):
            session.position = 4

    def test_sees_steps_taken_without_it(self, session, opener):
        session.step(torch.zeros(2, 4, 4))
        cache = SessionCache.of(session)
        assert (cache.get_seq_length(), cache.batch_size) == (4, 2)
        session.step(torch.zeros(2, 2, 4), hypo_ids=torch.tensor([1, 1]))
        run(cache, 2, 1)
        assert opener.steps[1:] == [((4, 4), (2, 2), (1, 1)), ((6, 6), (1, 1), None)]

    def test_crops_the_session(self, session):
        cache = SessionCache.of(session)
        run(cache, 1, 5)
        cache.crop(-2)
        assert session.position == cache.get_seq_length() == 3

    def test_prompts_are_hidden_from_all_but_the_model(self, session):
        session.num_prompt_tokens = 2
        cache = SessionCache.of(session)
        run(cache, 1, 5)
        assert (cache.get_seq_length(), cache.visible.num_columns) == (3, 3)
        with cache.shown_whole():
            assert (cache.get_seq_length(), cache.visible.num_columns) == (5, 5)
        cache.reset()
        assert (cache.get_seq_length(), session.position) == (0, 2)


def test_a_position_set_back_cuts_the_ids_at_the_same_column(opener):
    session = opener()
    session.num_prompt_tokens = 2
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    run(SessionCache.of(session), 2, 5, attention_mask=mask, follows_mask=True)
    session.output_ids = torch.arange(8).view(2, 4)
    session.position = 5
    assert session.output_ids.shape == (2, 4)
    session.position = 3
    assert session.output_ids.tolist() == [[0], [4]]
    assert session.lengths == (2, 3)
