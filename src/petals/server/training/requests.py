"""Requests for passes: what is checked before a pass runs, and what is answered.

Knows messages and peers; how a pass runs is decided in ``forward`` and ``backward``, when it runs
by the scheduler.
"""

from collections.abc import Awaitable, Callable, Sequence

from torch import Tensor

from petals.clock import Clock
from petals.errors import TrainingRefused
from petals.models.adapters.low_rank import Adapter
from petals.server.admission import validation
from petals.server.admission.adapter_store import AdapterStore
from petals.server.admission.offer import ServedModel
from petals.server.admission.validation import PeerByteBudget
from petals.server.compute.executor import Executor
from petals.server.training.backward import BackwardPass
from petals.server.training.forward import ForwardPass
from petals.server.training.saved_activations import PassInputs
from petals.server.training.saved_passes import SavedPasses
from petals.types import PeerId
from petals.wire import messages
from petals.wire.fields import Message
from petals.wire.passes import Backward, BackwardResult, Forward, ForwardResult

SendResult = Callable[[Message, Sequence[Tensor]], Awaitable[None]]


class Passes:
    """Runs the passes of all peers."""

    def __init__(
        self,
        offer: ServedModel,
        executor: Executor,
        bytes_: PeerByteBudget,
        adapters: AdapterStore,
        lease_seconds: float,
        clock: Clock,
    ) -> None:
        self._offer = offer
        self._executor = executor
        self._bytes = bytes_
        self._adapters = adapters
        self.saved = SavedPasses(lease_seconds, clock)

    def expire(self) -> None:
        """Let the compute thread drop what has outlived its lease."""
        self._executor.post(self.saved.expire)

    async def serve(
        self,
        peer: PeerId,
        message: Forward | Backward,
        tensors: Sequence[Tensor],
        answer: SendResult,
    ) -> None:
        """Run a pass and ``answer`` it. Its bytes count against the peer's budget until the answer
        is sent, so that a peer that does not read its answers cannot ask for more.

        Raises TrainingRefused (this server gives no gradients), PassExpired (saved activations are
        asked for, none are there), UnknownAdapter, PeerBusy, and what the checks of ``validation``
        and ``Executor.run`` raise.
        """
        request = message if isinstance(message, Forward) else message.forward
        validation.check_pass(self._offer, request)
        if self._offer.no_training and (message is not request or request.pass_id is not None):
            raise TrainingRefused(f"This server gives no gradients: {self._offer.no_training}.")
        with self._adapters.using(peer, request.adapter) as adapter:
            num_bytes = self._bytes_of(request, tensors)
            if isinstance(message, Backward) and message.wants_adapter and adapter is not None:
                num_bytes += adapter.num_bytes
            with self._bytes.hold(peer, num_bytes):
                if isinstance(message, Forward):
                    await answer(*await self._forward(peer, message, tensors, adapter))
                else:
                    await answer(*await self._backward(peer, message, tensors, adapter))

    async def _forward(
        self, peer: PeerId, message: Forward, tensors: Sequence[Tensor], adapter: Adapter | None
    ) -> tuple[ForwardResult, list[Tensor]]:
        inputs = self._inputs(message, tensors, adapter)
        slot = self.saved.slot(peer, message) if message.pass_id is not None else None
        outcome = await self._executor.run(ForwardPass(peer, inputs, slot))
        outputs, is_saved = outcome.value
        lease = self.saved.lease_seconds if is_saved else 0.0
        result = ForwardResult(outcome.queue_seconds, outcome.compute_seconds, is_saved, lease)
        return result, outputs

    async def _backward(
        self, peer: PeerId, message: Backward, tensors: Sequence[Tensor], adapter: Adapter | None
    ) -> tuple[BackwardResult, list[Tensor]]:
        request = message.forward
        num_gradients = 1 + len(request.taps)
        gradients, rest = tensors[:num_gradients], tensors[num_gradients:]
        given = None
        if message.kept:
            validation.check_nothing_more(rest)
        else:
            given = self._inputs(request, rest, adapter)
        validation.check_gradients(self._offer, request, gradients)
        slot = self.saved.slot(peer, request)
        outcome = await self._executor.run(
            BackwardPass(peer, given, gradients, slot, message.wants_adapter)
        )
        result = BackwardResult(outcome.queue_seconds, outcome.compute_seconds, given is not None)
        return result, outcome.value

    def _bytes_of(self, request: Forward, tensors: Sequence[Tensor]) -> int:
        """Bytes of host memory for a pass: its inputs and, in the widest dtype of these, outputs.

        outputs: sum(counts) * hidden_size * itemsize for the last block and each tap.
        """
        item = max((tensor.itemsize for tensor in tensors), default=1)
        outputs = sum(request.counts) * self._offer.hidden_size * item * (1 + len(request.taps))
        return sum(tensor.nbytes for tensor in tensors) + outputs

    def _inputs(
        self, request: Forward, tensors: Sequence[Tensor], adapter: Adapter | None
    ) -> PassInputs:
        blocks = messages.span(request.blocks)
        hidden, prompts = validation.pass_tensors(self._offer, request, tensors)
        return PassInputs(
            blocks=blocks,
            counts=request.counts,
            hidden=hidden,
            prompts=prompts,
            adapter=None if adapter is None else adapter.within(blocks),
            taps=request.taps,
        )
