"""A language-model head whose concurrent calls from several threads run as one matrix product.

A product with the head's matrix reads all of it from memory, which costs nearly the same for one
token and for eight. Several sessions in threads of one process therefore share products: a thread
that finds the head busy queues its rows, and the next product takes all queued rows. Sessions whose
steps ran in one batch on the servers arrive within about a millisecond of each other; so if other
threads have called lately, the next product waits up to ``_GRACE_SECONDS`` for each of them. A
thread that is the only caller never waits. Knows no sessions.
"""

import os
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from petals.models.loading.measure import is_clearly_faster
from petals.models.loading.weight_layout import by_column

_MAX_COPY_BYTES = 512 * 2**20
"""Size (bytes) of the largest weight of which a copy stored by column is kept."""

_MAX_ROWS = 32
"""Rows of one call above which it runs at once, as a plain linear layer: a prefill is limited by
arithmetic, so sharing its product saves nothing.
"""

_FEW_ROWS = 4
"""Rows of the product that is measured to choose the order of the factors."""

_GRACE_SECONDS = 0.002
"""Time (s) that a product waits for one more call from a thread that has called lately."""

_REMEMBERED_SECONDS = 1.0
"""Time (s) since its last call after which a thread is no longer waited for."""


class _HeadCall:
    __slots__ = ("output", "rows")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.output: Tensor | None = None


class SharedHead(nn.Linear):
    """hidden ``[..., H]`` -> logits ``[..., V]``, like the f32 CPU layer that it replaces.

    It shares the weight of that layer, so that tied embeddings stay tied. Two ways to multiply a
    few rows faster are used where they are measured to be faster, or as the arguments say:

    copy_by_column: one row is multiplied with a copy of the weight that is stored column by column
    (at most 512 MiB).
    swap_factors: 2 to 32 rows are multiplied as ``(W @ x.T).T`` in place of ``x @ W.T``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        copy_by_column: bool | None = None,
        swap_factors: bool | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._begin()
        weight = linear.weight.detach()
        self._columns: Tensor | None = _fast_copy(weight, copy_by_column)
        self._copied_state = self._weight_state
        self._swap_factors = _is_faster_swapped(weight) if swap_factors is None else swap_factors

    def _begin(self) -> None:
        self._process = os.getpid()
        self._calls: list[_HeadCall] = []
        self._last_call: dict[int, float] = {}  # thread id -> monotonic seconds
        self._queue_changed = threading.Condition()  # guards the two fields above
        self._product_lock = threading.Lock()  # held while a product is computed

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the calls of this process. The copy by column is made
        anew, since its weight is another tensor.
        """
        left_out = ("_calls", "_last_call", "_queue_changed", "_product_lock", "_copied_state")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return state | {"_columns": self._has_valid_copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._columns = by_column(self.weight.detach()) if self._columns else None
        self._copied_state = self._weight_state
        self._begin()

    def forward(self, hidden: Tensor) -> Tensor:
        num_rows = hidden.numel() // self.in_features
        learns = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        if learns or num_rows > _MAX_ROWS or hidden.dtype is not torch.float32:
            return super().forward(hidden)
        if self._process != os.getpid():
            self._begin()  # a forked child: the threads that hold the locks are not in it
        call = _HeadCall(hidden.reshape(num_rows, self.in_features))
        with self._queue_changed:
            self._calls.append(call)
            self._last_call[threading.get_ident()] = time.monotonic()
            self._queue_changed.notify_all()
        with self._product_lock:
            # The thread that held the lock before may have computed this call with its own.
            if call.output is None:
                self._wait_for_others()
                self._compute(call)
        assert call.output is not None
        return call.output.reshape(*hidden.shape[:-1], self.out_features)

    def _wait_for_others(self) -> None:
        """Wait while calls arrive from threads that called within ``_REMEMBERED_SECONDS``.

        Ends when all of them have queued a call, or when ``_GRACE_SECONDS`` pass without a new one.
        """
        with self._queue_changed:
            oldest = time.monotonic() - _REMEMBERED_SECONDS
            for thread in [thread for thread, at in self._last_call.items() if at < oldest]:
                del self._last_call[thread]
            num_calls = 0
            while num_calls < len(self._calls) < len(self._last_call):
                num_calls = len(self._calls)
                self._queue_changed.wait(_GRACE_SECONDS)

    def _compute(self, own: _HeadCall) -> None:
        """Compute all queued calls, ``own`` among them, in one product."""
        with self._queue_changed:
            calls, self._calls = self._calls, []
        try:
            rows = [call.rows for call in calls]
            # This thread's inference mode must not mark the outputs of other threads, which may
            # use theirs in autograd.
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._product(rows[0] if len(rows) == 1 else torch.cat(rows))
        except BaseException:
            # For example KeyboardInterrupt in this thread. The other threads wait for the lock and
            # find their calls in the queue again, so that each of them computes its own.
            with self._queue_changed:
                self._calls = [call for call in calls if call is not own] + self._calls
            raise
        for call, output in zip(calls, outputs.split([len(call.rows) for call in calls])):
            call.output = output

    def _product(self, rows: Tensor) -> Tensor:
        weight = self.weight
        if len(rows) == 1 and self._has_valid_copy():
            weight = self._columns
        elif 1 < len(rows) <= _MAX_ROWS and self._swap_factors:
            logits = (weight @ rows.t()).t().contiguous()
            return logits if self.bias is None else logits + self.bias
        return functional.linear(rows, weight, self.bias)

    @property
    def _weight_state(self) -> tuple[int, int]:
        """Changes when the weight is trained, loaded again or moved to another device."""
        return self.weight._version, self.weight.data_ptr()

    def _has_valid_copy(self) -> bool:
        """Whether there is a copy by column of the present weight; drops an outdated one."""
        if self._columns is not None and self._weight_state != self._copied_state:
            self._columns = None
        return self._columns is not None


def _fast_copy(weight: Tensor, wanted: bool | None) -> Tensor | None:
    """A copy of ``weight`` stored by column; None if it is too large, unwanted or not faster."""
    if wanted is False or weight.nbytes > _MAX_COPY_BYTES:
        return None
    columns, token = by_column(weight), torch.ones(1, weight.shape[1])
    if wanted or is_clearly_faster(
        lambda: functional.linear(token, columns), lambda: functional.linear(token, weight)
    ):
        return columns
    return None


def _is_faster_swapped(weight: Tensor) -> bool:
    tokens = torch.ones(_FEW_ROWS, weight.shape[1])
    return is_clearly_faster(lambda: weight @ tokens.t(), lambda: functional.linear(tokens, weight))
