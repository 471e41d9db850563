"""One server's part of a pass: whole sequences through some blocks, and gradients back.

The number, shapes, dtypes and finiteness of the returned tensors are checked before they are used.
Gradients may be infinite: mixed precision multiplies the loss until gradients overflow, and then
skips the step (``run_backward``). The caller decides about repairs and routes. Knows no model and
no tokens.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from petals.client.routing.failure_policy import misbehaved
from petals.client.routing.swarm_state import SwarmState
from petals.errors import PassExpired
from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan, Hop
from petals.wire.fields import Message
from petals.wire.passes import Backward, BackwardResult, Forward, ForwardResult
from petals.wire.services import BLOCKS_SERVICE
from petals.wire.tensors import is_finite, what_is_wrong

_PASS_ID_BYTES = 16

_PROBE_EXPONENT = -10
"""A server that answered with NaN or infinity is asked again with gradients whose largest value is
below 2**-10: in float16, whose largest value is below 2**16, that is room for a factor of 2**26.
"""
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True, eq=False)
class PassCall:
    """What whole sequences are run with, besides their hidden states.

    counts: tokens of each row. prompts: [blocks, 1 or rows, P, H], added to the first P tokens of
    every row at the input of each block. taps: blocks, counted from the model's first, whose
    outputs are returned too.
    """

    counts: tuple[int, ...]
    prompts: Tensor | None = None
    adapter: Adapter | None = None
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PassOutput:
    """The output of the last block, and that of each tapped block: all [sum(counts), H]."""

    hidden: Tensor
    tapped: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Of hidden [sum(counts), H], of prompts in their shape, of an adapter's tensors in order."""

    hidden: Tensor
    prompts: Tensor | None = None
    adapter: tuple[Tensor, ...] = ()


@dataclass(slots=True, eq=False)
class PassLeg:
    """A hop and its inputs.

    hidden: [sum(counts), H]; call: cut to the hop's blocks. ``wants_adapter``: gradients of the
    adapter's tensors are needed. ``kept_until``: time (s, monotonic) until which the server keeps
    the activations that the backward pass needs; 0: it keeps none.
    """

    hop: Hop
    hidden: Tensor
    call: PassCall
    wants_adapter: bool = False
    kept_until: float = 0.0
    pass_id: bytes = field(default_factory=lambda: secrets.token_bytes(_PASS_ID_BYTES))


def within(call: PassCall, whole: BlockSpan, blocks: BlockSpan) -> PassCall:
    """The part of a call for the blocks ``whole`` that concerns ``blocks``."""
    first = blocks.start - whole.start
    prompts, adapter = call.prompts, call.adapter
    return PassCall(
        counts=call.counts,
        prompts=None if prompts is None else prompts[first : first + len(blocks)],
        adapter=None if adapter is None else adapter.within(blocks),
        taps=tuple(block for block in call.taps if blocks.start <= block < blocks.end),
    )


async def run_forward(swarm: SwarmState, leg: PassLeg, *, is_training: bool) -> PassOutput:
    """Run the hop forward on its inputs.

    In training the server is asked to keep the activations for ``run_backward``. Raises the
    server's refusal and PeerError.
    """
    message = _forward(swarm, leg, leg.pass_id if is_training else None)
    answer, tensors = await _ask(swarm, leg, message, _inputs(leg), ForwardResult)
    if answer.kept:
        leg.kept_until = swarm.node.clock.monotonic() + answer.lease_seconds
    likes = [leg.hidden] * (1 + len(leg.call.taps))
    hidden, *tapped = _checked(leg, tensors, likes)
    return PassOutput(hidden, dict(zip(leg.call.taps, tapped)))


async def run_backward(swarm: SwarmState, leg: PassLeg, grads: PassOutput) -> Gradients:
    """Gradients of the hop's inputs, from the gradients of its output and of its taps.

    NaN and infinity in ``grads`` reach the server and come back, as in a local backward. If the
    answer alone is not finite, either the server is at fault, or finite gradients have overflowed
    in its dtype. Gradients are linear in ``grads``, so the server is asked once more with smaller
    ones: if that answer is finite, the first one is returned, and the user's gradient scaler acts
    on it. Raises the server's refusal and PeerError.
    """
    given = [grads.hidden, *(grads.tapped[block] for block in leg.call.taps)]
    found = await _gradients(swarm, leg, given)
    if not _all_finite(found) and _all_finite(given):
        smaller = _scaled_down(given)
        if smaller is None or not _all_finite(await _gradients(swarm, leg, smaller)):
            raise misbehaved(leg.hop, "NaN or infinity")
    hidden, *rest = found
    prompts = None if leg.call.prompts is None else rest.pop(0)
    return Gradients(hidden, prompts, tuple(rest))


async def _gradients(swarm: SwarmState, leg: PassLeg, given: Sequence[Tensor]) -> list[Tensor]:
    """Of hidden, of the prompts if there are any, and of the adapter's tensors if they are wanted.

    A server that has kept the activations gets the gradients ``given`` alone; any other also gets
    the inputs and recomputes the pass.
    """
    is_kept = swarm.node.clock.monotonic() < leg.kept_until
    leg.kept_until = 0.0  # kept activations serve one backward pass
    adapter = leg.call.adapter if leg.wants_adapter else None
    forward = _forward(swarm, leg, leg.pass_id)
    message = Backward(forward, kept=is_kept, wants_adapter=adapter is not None)
    try:
        tensors = (*given,) if is_kept else (*given, *_inputs(leg))
        _, answers = await _ask(swarm, leg, message, tensors, BackwardResult)
    except PassExpired as error:
        if not is_kept:
            raise misbehaved(leg.hop, "the loss of a pass that it was just given") from error
        return await _gradients(swarm, leg, given)
    likes = [*_inputs(leg), *(() if adapter is None else adapter.tensors)]
    return _checked(leg, answers, likes, any_value=True)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(is_finite(tensor) for tensor in tensors)


def _scaled_down(grads: Sequence[Tensor]) -> list[Tensor] | None:
    """All gradients times one power of two; None if they are small already."""
    largest = max((grad.abs().max().item() for grad in grads if grad.numel()), default=0.0)
    exponent = _PROBE_EXPONENT - math.frexp(largest)[1]
    if exponent >= 0:
        return None
    # In float64, because the factor itself may be too small for the dtype of the gradients.
    return [(grad.double() * 2.0**exponent).to(grad.dtype) for grad in grads]


def _forward(swarm: SwarmState, leg: PassLeg, pass_id: bytes | None) -> Forward:
    call, blocks = leg.call, leg.hop.blocks
    adapter = swarm.config.active_adapter if call.adapter is None else call.adapter.digest
    return Forward(
        model=swarm.model,
        blocks=(blocks.start, blocks.end),
        counts=call.counts,
        adapter=adapter,
        num_prompt_tokens=0 if call.prompts is None else call.prompts.shape[2],
        taps=call.taps,
        pass_id=pass_id,
    )


def _inputs(leg: PassLeg) -> tuple[Tensor, ...]:
    prompts = leg.call.prompts
    return (leg.hidden,) if prompts is None else (leg.hidden, prompts)


async def _ask(
    swarm: SwarmState, leg: PassLeg, message: Message, tensors: Sequence[Tensor], expect: type[M]
) -> tuple[M, list[Tensor]]:
    config, peer, adapter = swarm.config, leg.hop.peer_id, leg.call.adapter

    async def ask() -> tuple[M, list[Tensor]]:
        async with swarm.channels.lent(
            peer, BLOCKS_SERVICE, swarm.connect_seconds(peer)
        ) as channel:
            return await channel.request(
                message, tensors, expect=expect, timeout=config.request_timeout
            )

    return await swarm.adapters.use(peer, adapter, ask)


def _checked(
    leg: PassLeg, answer: Sequence[Tensor], likes: Sequence[Tensor], *, any_value: bool = False
) -> list[Tensor]:
    """``answer`` in the dtypes of ``likes``, if it can be right. Raises PeerMisbehaved."""
    wrong = what_is_wrong(answer, likes, any_dtype=True, any_value=any_value)
    if wrong:
        raise misbehaved(leg.hop, wrong)
    return [tensor.to(like.dtype) for tensor, like in zip(answer, likes)]
