"""A head that several threads use at once: calls that meet run as one product.

A head's matrix is read whole for every product, which costs nearly the same for one token and for
eight. Sessions that run in threads of one process come here one after another; whoever finds the
head busy leaves his rows, and the next product takes all that have gathered. Sessions whose steps
ran as one batch come within a moment of each other, so whoever is not the only one of late waits
that moment. A caller alone gets at once what a plain linear layer would give. Knows no sessions.
"""

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_BYTES = 2**20
"""Smaller matrices stay in the processor's cache: nothing is gained by sharing them."""

_MAX_COPY_BYTES = 512 * 2**20
_MAX_ROWS = 32
_FEW_ROWS = 4
_MIN_GAIN = 1.08
_GRACE_SECONDS = 0.002
"""After a call others may follow so closely that they belong to the same product."""

_REMEMBERED_SECONDS = 1.0
"""A thread that has not called for so long is expected no more."""

_REPEATS = 5


class _HeadCall:
    __slots__ = ("output", "rows")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.output: Tensor | None = None


class SharedHead(nn.Linear):
    """hidden ``[..., H]`` -> logits ``[..., V]``, as the f32 layer on a CPU it was made from.

    It shares that layer's weight, so that tied embeddings stay tied. Few rows are multiplied in the
    way that is fastest here: ``turned`` (one row: by a copy of the matrix that lies column by
    column, of at most 512 MB) and ``flipped`` (several: as ``(W @ x.T).T``) are measured if None.
    """

    def __init__(
        self, linear: nn.Linear, turned: bool | None = None, flipped: bool | None = None
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._calls: list[_HeadCall] = []
        self._callers: dict[int, float] = {}  # thread -> when it last called
        self._gate = threading.Condition()  # around the two, for a moment
        self._turn = threading.Lock()  # around the product
        weight = linear.weight.detach()
        fits = weight.nbytes <= _MAX_COPY_BYTES
        columns = weight.t().contiguous().t() if fits and turned is not False else None
        if columns is not None and turned is None and not _is_faster_turned(weight, columns):
            columns = None
        self._columns = columns
        self._copied = self._state
        self._flipped = _is_faster_flipped(weight) if flipped is None else flipped

    def forward(self, hidden: Tensor) -> Tensor:
        num_rows = hidden.numel() // self.in_features
        learns = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        if learns or num_rows > _MAX_ROWS or hidden.dtype is not torch.float32:
            return super().forward(hidden)
        call = _HeadCall(hidden.reshape(num_rows, self.in_features))
        with self._gate:
            self._calls.append(call)
            self._callers[threading.get_ident()] = time.monotonic()
            self._gate.notify_all()
        with self._turn:
            if call.output is None:
                self._gather()
                self._serve(call)
        assert call.output is not None
        return call.output.reshape(*hidden.shape[:-1], self.out_features)

    def _gather(self) -> None:
        """Wait while those who called of late keep coming."""
        with self._gate:
            since = time.monotonic() - _REMEMBERED_SECONDS
            for caller in [caller for caller, at in self._callers.items() if at < since]:
                del self._callers[caller]
            num_calls = 0
            while num_calls < len(self._calls) < len(self._callers):
                num_calls = len(self._calls)
                self._gate.wait(_GRACE_SECONDS)

    def _serve(self, own: _HeadCall) -> None:
        """Answer all who have gathered; after an interrupt the others see to themselves."""
        with self._gate:
            calls, self._calls = self._calls, []
        try:
            rows = [call.rows for call in calls]
            # No caller's inference mode may mark what another one gets.
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._product(rows[0] if len(rows) == 1 else torch.cat(rows))
        except BaseException:
            with self._gate:
                self._calls = [call for call in calls if call is not own] + self._calls
            raise
        for call, output in zip(calls, outputs.split([len(call.rows) for call in calls])):
            call.output = output

    def _product(self, rows: Tensor) -> Tensor:
        weight = self.weight
        if len(rows) == 1 and self._columns is not None and self._is_unchanged():
            weight = self._columns
        elif 1 < len(rows) <= _MAX_ROWS and self._flipped:
            logits = (weight @ rows.t()).t().contiguous()
            return logits if self.bias is None else logits + self.bias
        return functional.linear(rows, weight, self.bias)

    @property
    def _state(self) -> tuple[int, int]:
        """Changes whenever the weight is trained, loaded anew or moved to another device."""
        return self.weight._version, self.weight.data_ptr()

    def _is_unchanged(self) -> bool:
        """Whether the turned copy still is a copy."""
        if self._state != self._copied:
            self._columns = None
        return self._columns is not None


def _is_faster_turned(weight: Tensor, columns: Tensor) -> bool:
    token = torch.ones(1, weight.shape[1])
    return _is_faster(
        lambda: functional.linear(token, columns), lambda: functional.linear(token, weight)
    )


def _is_faster_flipped(weight: Tensor) -> bool:
    tokens = torch.ones(_FEW_ROWS, weight.shape[1])
    return _is_faster(lambda: weight @ tokens.t(), lambda: functional.linear(tokens, weight))


def _is_faster(candidate: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """The least of some repeats each, in turns, since others run too."""
    with torch.inference_mode():
        taken = [(_seconds(candidate), _seconds(plain)) for _ in range(_REPEATS)]
    return min(ours for ours, _ in taken) * _MIN_GAIN < min(theirs for _, theirs in taken)


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
