"""A session's inputs, as a replay would send them."""

import torch
from torch import Tensor

from petals.client.session.input_log import InputLog, RowSlices, cut


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def listed(inputs: InputLog) -> list[list[int]]:
    whole = inputs.whole()
    if whole is None:
        return [[] for _ in inputs.lengths]
    assert whole.counts == inputs.lengths
    rows = torch.split(whole.hidden, list(whole.counts))
    return [[int(value) for value in row.flatten()] for row in rows]


def two_rows() -> InputLog:
    inputs = InputLog(2)
    inputs.append((3, 2), numbers(1, 2, 3, 11, 12))
    inputs.append((1, 0), numbers(4))
    return inputs


def test_rows_grow() -> None:
    inputs = two_rows()
    assert inputs.lengths == (4, 2)
    assert listed(inputs) == [[1, 2, 3, 4], [11, 12]]


def test_nothing_is_nothing() -> None:
    assert InputLog(3).whole() is None


def test_what_came_since() -> None:
    inputs = two_rows()
    since = inputs.since((2, 2))
    assert since is not None
    assert (since.starts, since.counts) == ((2, 2), (2, 0))
    assert since.hidden.flatten().tolist() == [3.0, 4.0]
    assert inputs.since(inputs.lengths) is None


def test_a_branch_rolls_back_and_leaves_its_origin() -> None:
    inputs = two_rows()
    branch = inputs.branch((2, 0))
    branch.append((1, 1), numbers(5, 15))
    assert listed(branch) == [[1, 2, 5], [15]]
    assert listed(inputs) == [[1, 2, 3, 4], [11, 12]]


def test_a_branch_reorders_before_it_rolls_back() -> None:
    branch = two_rows().branch((1, 4, 3), (1, 0, 0))
    branch.append((0, 0, 1), numbers(9))
    assert listed(branch) == [[11], [1, 2, 3, 4], [1, 2, 3, 9]]


def test_parts_follow_each_other() -> None:
    whole = RowSlices((2, 5, 0), (3, 0, 2), numbers(1, 2, 3, 4, 5))
    parts = [(part.starts, part.counts, len(part.hidden)) for part in cut(whole, 2)]
    assert parts == [
        ((2, 5, 0), (2, 0, 0), 2),
        ((4, 5, 0), (1, 0, 1), 2),
        ((5, 5, 1), (0, 0, 1), 1),
    ]
    assert list(cut(whole, 0)) == [whole]
