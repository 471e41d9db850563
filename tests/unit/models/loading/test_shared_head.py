"""A head that threads share: the numbers of a linear layer, fewer products, nobody forgotten."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from petals.models.loading import shared_head
from petals.models.loading.shared_head import SharedHead

WIDTH, VOCABULARY = 16, 40


def a_linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)


class Watched(SharedHead):
    """Counts products; the first one waits at ``door``, and fails if it is told to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, copy_by_column=False, swap_factors=True)
        self.products: list[int] = []
        self.door = threading.Event()
        self.fails_once = False

    def _product(self, rows: Tensor) -> Tensor:
        self.products.append(len(rows))
        if len(self.products) == 1:
            assert self.door.wait(10)
            if self.fails_once:
                raise KeyboardInterrupt
        return super()._product(rows)

    def wait_for_calls(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self._calls) < count:
            assert time.monotonic() < deadline
            time.sleep(0)


@pytest.mark.parametrize("copy_by_column", [False, True])
@pytest.mark.parametrize("swap_factors", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (7, 9), (1, 0)])
def test_the_numbers_are_those_of_the_linear_layer(
    copy_by_column: bool, swap_factors: bool, bias: bool, shape: tuple[int, int]
) -> None:
    linear = a_linear(bias)
    hidden = torch.randn(*shape, WIDTH)
    head = SharedHead(linear, copy_by_column, swap_factors)
    torch.testing.assert_close(head(hidden), linear(hidden))
    assert head.weight is linear.weight


def test_calls_that_meet_run_as_one_product() -> None:
    linear = a_linear()
    head = Watched(linear)
    inputs = [torch.randn(1, 1, WIDTH) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(head, inputs[0])
        while not head.products:
            time.sleep(0)
        others = [pool.submit(head, hidden) for hidden in inputs[1:]]
        head.wait_for_calls(5)
        head.door.set()
        outputs = [first.result(10), *(other.result(10) for other in others)]
    assert head.products == [1, 5]
    for hidden, output in zip(inputs, outputs):
        torch.testing.assert_close(output, linear(hidden))


def test_those_who_come_a_moment_after_each_other_run_as_one_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = a_linear()
    head = Watched(linear)
    head.door.set()
    inputs = [torch.randn(1, 1, WIDTH) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = threading.Barrier(4)

        def call(hidden: Tensor) -> Tensor:
            together.wait(10)
            return head(hidden)

        list(pool.map(call, inputs))  # now all four are known
        head.products.clear()
        monkeypatch.setattr(shared_head, "_GRACE_SECONDS", 10.0)
        outputs = list(pool.map(call, inputs))
    assert head.products == [4]
    for hidden, output in zip(inputs, outputs):
        torch.testing.assert_close(output, linear(hidden))


def test_one_who_is_interrupted_leaves_the_others_their_turn() -> None:
    linear = a_linear()
    head = Watched(linear)
    head.fails_once = True
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(head, torch.randn(1, 1, WIDTH))
        while not head.products:
            time.sleep(0)
        inputs = [torch.randn(1, 1, WIDTH) for _ in range(2)]
        others = [pool.submit(head, hidden) for hidden in inputs]
        head.wait_for_calls(2)
        head.door.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(10)
        for hidden, other in zip(inputs, others):
            torch.testing.assert_close(other.result(10), linear(hidden))


def test_a_head_that_learns_is_a_plain_layer_and_keeps_no_stale_copy() -> None:
    linear = a_linear().requires_grad_(True)
    head = SharedHead(linear, copy_by_column=True, swap_factors=True)
    hidden = torch.randn(1, 1, WIDTH)
    head(hidden).sum().backward()
    assert linear.weight.grad is not None
    torch.optim.SGD(head.parameters(), lr=0.5).step()
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), functional.linear(hidden, linear.weight))


def test_a_head_that_moves_keeps_no_copy_behind() -> None:
    """As `model.to("cuda")` does: other memory for the same parameter."""
    linear = nn.Linear(24, 100)
    head = SharedHead(linear, copy_by_column=True)
    token = torch.randn(1, 24)
    with torch.inference_mode():
        head(token)
        head.weight.data = head.weight.data * 2
        assert torch.equal(head(token), functional.linear(token, head.weight, head.bias))


def test_inference_mode_of_one_caller_does_not_mark_what_others_get() -> None:
    head = SharedHead(a_linear(), copy_by_column=False, swap_factors=False)
    with torch.inference_mode():
        output = head(torch.randn(1, 2, WIDTH))
    assert not output.is_inference()
    (output * nn.Parameter(torch.ones(()))).sum().backward()
