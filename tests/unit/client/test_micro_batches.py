"""How a pass is cut into micro-batches."""

from petals.client.training.batch import MAX_TOKENS, micro_batch_tokens, micro_batches


def test_micro_batches_hold_whole_rows() -> None:
    assert list(micro_batches((3, 3, 3, 9, 1), 6)) == [(3, 3), (3,), (9,), (1,)]
    assert list(micro_batches((), 6)) == []
    assert list(micro_batches((0,) * 300, 6)) == [(0,) * 128, (0,) * 128, (0,) * 44]


def test_a_route_of_n_hops_gets_about_twice_n() -> None:
    assert micro_batch_tokens(10, 3) == 64
    assert micro_batch_tokens(768, 3) == 128
    assert micro_batch_tokens(10**6, 3) == MAX_TOKENS
