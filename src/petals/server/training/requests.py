"""Passes at the door: what they may ask for, what is kept of them, what is answered.

Whole sequences through some blocks and, for training, back. Knows messages and peers; how a pass
runs is the walks' affair, when it runs the scheduler's.
"""

from collections.abc import Awaitable, Callable, Sequence

from torch import Tensor

from petals.clock import Clock
from petals.errors import TrainingRefused
from petals.models.adapters.low_rank import Adapter
from petals.server.admission import validation
from petals.server.admission.adapter_store import AdapterStore
from petals.server.admission.offer import ServedModel
from petals.server.admission.peer_budget import ByteAllowance
from petals.server.compute.device import DeviceContext
from petals.server.compute.executor import Executor
from petals.server.compute.jobs import PassRun
from petals.server.training.backward import BackwardWalk
from petals.server.training.chunked_pass import PassInputs
from petals.server.training.chunks import BACKWARD_WORTH, FORWARD_WORTH, worth_of
from petals.server.training.forward import ForwardWalk
from petals.server.training.saved_activations import KeptPasses
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
        bytes_: ByteAllowance,
        adapters: AdapterStore,
        lease_seconds: float,
        clock: Clock,
    ) -> None:
        self._offer = offer
        self._executor = executor
        self._bytes = bytes_
        self._adapters = adapters
        self._lease_seconds = lease_seconds
        self.kept = KeptPasses(lease_seconds, clock)

    def expire(self) -> None:
        """Drop, soon, what is kept beyond its lease."""
        self._executor.post(self.kept.expire)

    async def serve(
        self,
        peer: PeerId,
        message: Forward | Backward,
        tensors: Sequence[Tensor],
        answer: SendResult,
    ) -> None:
        """Run a pass and ``answer`` it; its bytes count until the answer is on its way.

        Raises TrainingRefused (a way back is asked for, or to be expected), PassExpired (``kept``,
        but it is not), UnknownAdapter, PeerBusy, and what the checks and ``Executor.run_pass``
        raise.
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
        """Hidden [sum(counts), H] in the dtype it came in, then the same of each tap."""
        inputs = self._inputs(message, tensors, adapter)
        keep = message.pass_id is not None
        outputs: list[Tensor] = []
        was_kept = False

        def start(place: DeviceContext) -> ForwardWalk:
            return ForwardWalk(place, inputs, keep)

        def finish(walk: ForwardWalk) -> None:
            nonlocal was_kept
            dtype = inputs.hidden.dtype
            outputs.extend(out.to("cpu", dtype) for out in (walk.output, *walk.tapped.values()))
            if walk.trail is not None:
                was_kept = True
                self.kept.keep(peer, message, walk.trail)

        times = await self._executor.run_pass(
            PassRun(peer, self._worth(message, FORWARD_WORTH), start, finish)
        )
        lease = self._lease_seconds if was_kept else 0.0
        return ForwardResult(times.queue_seconds, times.compute_seconds, was_kept, lease), outputs

    async def _backward(
        self, peer: PeerId, message: Backward, tensors: Sequence[Tensor], adapter: Adapter | None
    ) -> tuple[BackwardResult, list[Tensor]]:
        """The gradients of hidden, prompts and adapter, each in the dtype of what it belongs to."""
        request = message.forward
        num_gradients = 1 + len(request.taps)
        gradients, rest = tensors[:num_gradients], tensors[num_gradients:]
        given = None
        if message.kept:
            validation.check_nothing_more(rest)
        else:
            given = self._inputs(request, rest, adapter)
        validation.check_gradients(self._offer, request, gradients)
        found: list[Tensor] = []

        def start(place: DeviceContext) -> BackwardWalk:
            if given is not None:
                walk = BackwardWalk(place, given, gradients, None)
                self.kept.drop(peer, request)
                return walk
            trail = self.kept.find(peer, request)
            walk = BackwardWalk(place, trail.inputs, gradients, trail)
            self.kept.release(peer, request)
            return walk

        def finish(walk: BackwardWalk) -> None:
            found.extend(walk.results(message.wants_adapter))

        cost_tokens = BACKWARD_WORTH if message.kept else FORWARD_WORTH + BACKWARD_WORTH
        times = await self._executor.run_pass(
            PassRun(peer, self._worth(request, cost_tokens), start, finish)
        )
        result = BackwardResult(times.queue_seconds, times.compute_seconds, given is not None)
        return result, found

    def _bytes_of(self, request: Forward, tensors: Sequence[Tensor]) -> int:
        """Bytes a pass needs here while it lasts: what came and what will be answered."""
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

    def _worth(self, request: Forward, cost_tokens: int) -> int:
        start, end = request.blocks
        return worth_of(sum(request.counts), end - start, cost_tokens, len(self._offer.blocks))
