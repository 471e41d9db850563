"""Whole sequences through the swarm as one differentiable operation, for synchronous callers.

Knows no servers and no routes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petals.client.connection.event_loop import client_loop
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.training.batch import Pass
from petals.client.training.hop_call import PassCall, PassOutput
from petals.errors import BadInput
from petals.types import BlockSpan
from petals.wire.tensors import check_states


def run_whole(
    access: SwarmConnection, blocks: BlockSpan, hidden: Tensor, call: PassCall
) -> PassOutput:
    """Run whole sequences through ``blocks``; servers keep at most what a backward pass needs.

    hidden: [sum(counts), H] floating, row after row; the outputs have its shape, dtype and device.
    Differentiable, once, with respect to hidden, prompts and the adapter's tensors; infinite
    gradients flow through, as mixed precision needs. Raises BadInput, RouteError, the servers'
    refusals (TrainingRefused), PeerError after ``max_retries``; the backward pass raises likewise.
    """
    _check(blocks, hidden, call)
    if not len(blocks) or not hidden.shape[0]:
        return PassOutput(hidden, dict.fromkeys(call.taps, hidden))
    tensors = () if call.adapter is None else call.adapter.tensors
    prompts = () if call.prompts is None else (call.prompts,)
    inputs = (hidden, *prompts, *tensors)
    is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    local = _Here(access, blocks, call, is_training)
    if not is_training:
        first, *tapped = local.forward(hidden)
    else:
        first, *tapped = _RemotePass.apply(local, *inputs)
    return PassOutput(first, dict(zip(call.taps, tapped)))


class _Here:
    """A pass seen from the caller's thread: his devices and dtypes."""

    def __init__(
        self, access: SwarmConnection, blocks: BlockSpan, call: PassCall, is_training: bool
    ) -> None:
        self._call = call
        prompts = None if call.prompts is None else call.prompts.detach()
        own = PassCall(call.counts, prompts, call.adapter, call.taps)
        self._pass = Pass(access, blocks, own, is_training=is_training)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The output, then what was tapped."""
        output = client_loop.run(self._pass.forward(hidden.detach()))
        found = (output.hidden, *(output.tapped[block] for block in self._call.taps))
        return tuple(tensor.to(hidden.device) for tensor in found)

    def backward(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of hidden, of the prompts and of the adapter's tensors, those there are."""
        hidden, *tapped = grads
        given = PassOutput(hidden, dict(zip(self._call.taps, tapped)))
        found = client_loop.run(self._pass.backward(given))
        prompts = () if found.prompts is None else (found.prompts,)
        return (found.hidden, *prompts, *found.adapter)


class _RemotePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: _Here, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.here = here
        # Kept by the pass as well; saved, so that torch notices when somebody writes into them.
        ctx.save_for_backward(hidden, *others)
        return here.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = ctx.here.backward(grads)
        padded = (*found, *(None,) * (len(inputs) - len(found)))
        given = [None if grad is None else grad.to(tensor) for grad, tensor in zip(padded, inputs)]
        return None, *given


def _check(blocks: BlockSpan, hidden: Tensor, call: PassCall) -> None:
    """Raises BadInput for what no server would take."""
    if hidden.dim() != 2 or hidden.shape[0] != sum(call.counts):
        raise BadInput(
            f"Hidden states {list(hidden.shape)} for {sum(call.counts)} tokens.",
            hint="They are packed: [sum(counts), hidden_size].",
        )
    outside = [block for block in call.taps if not blocks.start <= block < blocks.end]
    if outside:
        raise BadInput(
            f"Blocks {outside} are not among {blocks}, so their outputs cannot be had.",
            hint="Taps count from the model's first block.",
        )
    check_states(hidden)
    if call.prompts is not None:
        check_states(call.prompts)
        if call.prompts.shape[-1] != hidden.shape[-1]:
            raise BadInput(
                f"Prompts of width {call.prompts.shape[-1]} for states of {hidden.shape[-1]}.",
                hint="Both have the model's hidden size.",
            )
