"""The cache records; the next step carries."""

import pytest
import torch
from transformers import Cache

from petals.client.model.padding import ColumnLayout
from petals.client.model.remote_cache import RemoteCache
from petals.errors import BadInput, NotSupported, SessionClosed


class Recorder:
    """A session that answers what it gets and remembers how it was asked."""

    def __init__(self):
        self.steps, self.is_closed, self.error = [], False, None
        self.lengths, self.output_ids, self.past_key_values = (), None, None

    @property
    def position(self):
        return max(self.lengths, default=0)

    @position.setter
    def position(self, value):
        self.lengths = tuple(min(value, length) for length in self.lengths)

    def step_rows(self, hidden, *, starts, counts, reorder=None):
        if self.error is not None:
            raise self.error
        self.steps.append((starts, counts, reorder))
        self.lengths = tuple(s + c for s, c in zip(starts, counts))
        return hidden

    def close(self):
        self.is_closed = True


@pytest.fixture
def session():
    return Recorder()


@pytest.fixture
def cache(session):
    return RemoteCache(lambda num_rows, max_length: session)


def run(cache, num_rows, num_columns, **told):
    hidden = torch.randn(num_rows, num_columns, 4)
    return cache.step(hidden, cache.read(num_rows, ColumnLayout(num_columns=num_columns, **told)))


def test_opens_once_with_the_rows_of_the_first_step():
    opened = []
    session = Recorder()
    cache = RemoteCache(lambda *asked: opened.append(asked) or session)
    cache.reserve(9)
    run(cache, 2, 3)
    run(cache, 2, 1)
    cache.reserve(20)
    assert opened == [(2, 9)]
    assert cache.get_max_length() == 9


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


def test_a_crop_rides_on_the_next_step(cache, session):
    run(cache, 1, 5)
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    assert len(session.steps) == 1
    run(cache, 1, 1)
    assert session.steps[-1] == ((3,), (1,), None)


def test_a_crop_of_nothing_changes_nothing(cache, session):
    run(cache, 1, 5)
    cache.crop(0)
    run(cache, 1, 1)
    assert session.steps[-1] == ((5,), (1,), None)


def test_a_crop_is_negative(cache):
    with pytest.raises(BadInput, match="negative"):
        cache.crop(3)


def test_reset_begins_again(cache, session):
    run(cache, 1, 5)
    cache.reset()
    run(cache, 1, 2)
    assert session.steps[-1] == ((0,), (2,), None)


def test_forks_add_up_until_the_next_step(cache, session):
    run(cache, 3, 2)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    run(cache, 4, 1)
    run(cache, 4, 1)
    assert [reorder for _, _, reorder in session.steps] == [None, [2, 2, 1, 1], None]


def test_an_order_that_changes_nothing_is_not_sent(cache, session):
    run(cache, 2, 2)
    cache.reorder_cache(torch.tensor([0, 1]))
    run(cache, 2, 1)
    assert session.steps[-1][2] is None


def test_rows_by_a_mask_and_rows_that_are_not_there(cache, session):
    run(cache, 3, 2)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    run(cache, 2, 1)
    assert session.steps[-1][2] == [0, 2]
    with pytest.raises(BadInput, match="not all among"):
        cache.batch_select_indices(torch.tensor([5]))


def test_padding_moves_with_its_row(cache, session):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    outputs = run(cache, 2, 3, attention_mask=mask)
    assert not outputs[0, 0].any()
    assert session.steps[-1] == ((0, 0), (2, 3), None)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    grown = torch.tensor([[1, 1, 1], [0, 1, 1]])
    run(cache, 2, 1, attention_mask=grown)
    assert session.steps[-1] == ((2, 1), (1, 1), [1, 0])


def test_an_error_changes_nothing(cache, session):
    run(cache, 2, 2)
    cache.reorder_cache(torch.tensor([1, 1]))
    session.error = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        run(cache, 2, 1)
    session.error = None
    assert cache.get_seq_length() == 2
    run(cache, 2, 1)
    assert session.steps[-1] == ((2, 2), (1, 1), [1, 1])


def test_another_number_of_rows(cache):
    run(cache, 2, 2)
    with pytest.raises(BadInput, match="3 rows, its session has 2"):
        run(cache, 3, 1)


def test_closing(cache, session):
    with cache:
        run(cache, 1, 2)
    assert session.is_closed
    with pytest.raises(SessionClosed) as refusal:
        run(cache, 1, 1)
    assert "inference_session" in refusal.value.hint


class TestOfAnOpenSession:
    def test_is_the_same_for_the_same_session(self, session):
        assert RemoteCache.of(session) is RemoteCache.of(session)

    def test_follows_a_position_set_back(self, session):
        run(RemoteCache.of(session), 1, 5)
        session.position = 2
        assert RemoteCache.of(session).get_seq_length() == 2

    def test_follows_steps_taken_without_it(self, session):
        session.lengths = (4, 4)
        cache = RemoteCache.of(session)
        assert (cache.get_seq_length(), cache.batch_size) == (4, 2)
        session.lengths = (6, 6)
        run(RemoteCache.of(session), 2, 1)
        assert session.steps[-1] == ((6, 6), (1, 1), None)

    def test_tells_what_it_cropped(self, session):
        cache = RemoteCache.of(session)
        run(cache, 1, 5)
        cache.crop(-2)
        cache.tell_position()
        assert session.position == 3
        assert RemoteCache.of(session).get_seq_length() == 3

    def test_a_crop_not_yet_told_is_not_undone(self, session):
        cache = RemoteCache.of(session)
        run(cache, 1, 5)
        cache.crop(-2)
        assert RemoteCache.of(session).get_seq_length() == 3
