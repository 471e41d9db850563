"""A head that threads share: the numbers of a linear layer, fewer products, nobody forgotten."""

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
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


class Products:
    """Stands in for torch's ``functional``: notes the rows of each product, and waits at the first
    until ``may_go_on``, where it fails if it ``fails_once``.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.may_go_on = threading.Event()
        self.fails_once = False

    def linear(self, rows: Tensor, *layer: Tensor) -> Tensor:
        self.rows.append(len(rows))
        if len(self.rows) == 1:
            assert self.may_go_on.wait(10)
            if self.fails_once:
                raise KeyboardInterrupt
        return functional.linear(rows, *layer)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    products = Products()
    monkeypatch.setattr(shared_head, "functional", products)
    return products


def plain_head(linear: nn.Linear) -> SharedHead:
    return SharedHead(linear, copy_by_column=False, swap_factors=False)


def call_together(pool: ThreadPoolExecutor, head: SharedHead, inputs: list[Tensor]) -> list[Tensor]:
    """A call from each thread of the pool, so that the head knows them all from now on."""
    together = threading.Barrier(len(inputs))

    def call(hidden: Tensor) -> Tensor:
        together.wait(10)
        return head(hidden)

    return list(pool.map(call, inputs))


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


def test_calls_that_find_the_head_busy_run_as_one_product(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, inputs = a_linear(), [torch.randn(1, 1, WIDTH) for _ in range(7)]
    head = plain_head(linear)
    monkeypatch.setattr(shared_head, "_GRACE_SECONDS", 10.0)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(head, inputs[0])
        while not products.rows:
            time.sleep(0)
        # Five threads queue a call each; the sixth follows when its first product is done.
        others = [pool.submit(head, hidden) for hidden in inputs[1:]]
        while len(head._calls) < 5:
            time.sleep(0)
        products.may_go_on.set()
        outputs = [call.result(10) for call in [first, *others]]
    assert products.rows == [1, 6]
    for hidden, output in zip(inputs, outputs):
        torch.testing.assert_close(output, linear(hidden))


def test_calls_a_moment_after_each_other_run_as_one_product(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, inputs = a_linear(), [torch.randn(1, 1, WIDTH) for _ in range(4)]
    head = plain_head(linear)
    products.may_go_on.set()
    with ThreadPoolExecutor(4) as pool:
        call_together(pool, head, inputs)
        products.rows.clear()
        monkeypatch.setattr(shared_head, "_GRACE_SECONDS", 10.0)
        outputs = call_together(pool, head, inputs)
    assert products.rows == [4]
    for hidden, output in zip(inputs, outputs):
        torch.testing.assert_close(output, linear(hidden))


def test_an_interrupted_product_is_computed_for_the_other_threads(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, inputs = a_linear(), [torch.randn(1, 1, WIDTH) for _ in range(4)]
    head = plain_head(linear)
    products.may_go_on.set()
    with ThreadPoolExecutor(3) as pool:
        call_together(pool, head, inputs[:3])
        products.rows.clear()
        monkeypatch.setattr(shared_head, "_GRACE_SECONDS", 10.0)
        products.fails_once = True
        # The interrupted thread takes the fourth call, and joins the other two.
        calls = [pool.submit(head, hidden) for hidden in inputs]
        errors = [call.exception(10) for call in calls]
    assert [type(error) for error in errors if error is not None] == [KeyboardInterrupt]
    assert products.rows == [3, 3]
    for hidden, call, error in zip(inputs, calls, errors):
        if error is None:
            torch.testing.assert_close(call.result(), linear(hidden))


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
@pytest.mark.parametrize("by_column", [True, False])
def test_a_copy_has_a_weight_and_a_queue_of_its_own(
    copied: Callable[[SharedHead], SharedHead], by_column: bool
) -> None:
    linear, token = a_linear(bias=True), torch.randn(1, WIDTH)
    head = SharedHead(linear, copy_by_column=by_column, swap_factors=False)
    expected = head(token)
    twin = copied(head)
    assert torch.allclose(twin(token), expected)
    with torch.no_grad():
        twin.weight.add_(1.0)
        assert torch.allclose(twin(token), expected + token.sum())
    assert torch.allclose(head(token), expected)


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    head = SharedHead(a_linear(), copy_by_column=False, swap_factors=False)
    with head._product_lock:  # as a thread of the parent holds it while it computes
        child = os.fork()
        if child == 0:
            os._exit(head(torch.zeros(1, 2, WIDTH)).shape[1])
    deadline = time.monotonic() + 30.0
    ended = (0, 0)
    while not ended[0] and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 2
