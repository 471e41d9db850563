"""Some rows of a pass on their way through the swarm, forward and back.

The input of every hop is kept for the way back, so that a server that fails, in either direction,
is replaced from where it failed and nothing else is done twice: its range alone is run again, by
one server or by several. Knows routes and servers; knows no model and no tokens.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from petals.client.block_runner import PassCall, PassOutput
from petals.client.pass_leg import Gradients, Leg, run_backward, run_forward, within
from petals.client.routing import Needs
from petals.client.swarm_view import SwarmView
from petals.errors import (
    BadInput,
    BlocksNotServed,
    CacheFull,
    MissingBlocksError,
    NoCapacity,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    RequestError,
    TrainingRefused,
)
from petals.types import BlockSpan, Hop, PeerId, Route

_LOOK_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class _Walked:
    """Hops one after the other, and what came out of the last of them; None: it was left out."""

    legs: list[Leg]
    output: Tensor | None
    tapped: dict[int, Tensor]


class MicroBatch:
    """Whole rows through ``blocks``. ``forward`` once, then ``backward`` as often as asked."""

    def __init__(
        self, view: SwarmView, blocks: BlockSpan, call: PassCall, *, is_training: bool
    ) -> None:
        self._view = view
        self._blocks = blocks
        self._call = call
        self._is_training = is_training
        self._legs: list[Leg] = []
        tensors = () if call.adapter is None else call.adapter.tensors
        self._wants_adapter = any(tensor.requires_grad for tensor in tensors)
        self._refused: dict[PeerId, PetalsError] = {}
        self._called_again: set[PeerId] = set()
        self._num_refusals = 0
        self._lost: dict[PeerId, PetalsError] = {}

    async def forward(self, hidden: Tensor) -> PassOutput:
        """hidden: [sum(counts), H]. Raises RouteError, the servers' refusals, PeerError."""
        walked = await self._walk(self._blocks, hidden)
        self._legs = walked.legs
        assert walked.output is not None
        return PassOutput(walked.output, walked.tapped)

    async def backward(self, grads: PassOutput) -> Gradients:
        """Gradients of what ``forward`` was given, from those of what it gave. Raises likewise."""
        grad, prompts = grads.hidden, None
        if self._call.prompts is not None:
            prompts = torch.empty_like(self._call.prompts)
        adapter: dict[tuple[int, str], Sequence[Tensor]] = {}
        todo, done = list(self._legs), []
        while todo:
            leg = todo.pop()
            try:
                found = await run_backward(self._view, leg, replace(grads, hidden=grad))
            except PetalsError as error:
                await self._learn(leg.hop, error)
                todo += (await self._walk(leg.hop.blocks, leg.hidden, to_last=True)).legs
                continue
            self._num_refusals = 0
            done.append(leg)
            grad = found.hidden
            if prompts is not None and found.prompts is not None:
                first = leg.hop.blocks.start - self._blocks.start
                prompts[first : first + len(leg.hop.blocks)] = found.prompts
            if leg.call.adapter is not None:
                pairs = zip(found.adapter[::2], found.adapter[1::2], strict=True)
                adapter |= dict(zip(leg.call.adapter.parts, pairs))
        self._legs = done[::-1]
        return Gradients(grad, prompts, self._in_order(adapter))

    def _in_order(self, found: Mapping[tuple[int, str], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Gradients of the adapter's tensors as the adapter orders them."""
        if self._call.adapter is None or not self._wants_adapter:
            return ()
        return tuple(grad for slot in self._call.adapter.parts for grad in found[slot])

    async def _walk(self, blocks: BlockSpan, hidden: Tensor, *, to_last: bool = False) -> _Walked:
        """Through ``blocks``, around those who fail; ``to_last``: not through the last hop."""
        legs: list[Leg] = []
        tapped: dict[int, Tensor] = {}
        while len(blocks):
            for hop in await self._route(blocks):
                own = within(self._call, self._blocks, hop.blocks)
                leg = Leg(hop, hidden, own, self._wants_adapter)
                if to_last and hop.blocks.end == blocks.end:
                    return _Walked([*legs, leg], None, tapped)
                try:
                    output = await run_forward(self._view, leg, is_training=self._is_training)
                except PetalsError as error:
                    await self._learn(hop, error)
                    break
                self._num_refusals = 0
                if self._is_training:
                    legs.append(leg)
                hidden, tapped = output.hidden, tapped | output.tapped
                blocks = BlockSpan(hop.blocks.end, blocks.end)
        return _Walked(legs, hidden, tapped)

    async def _route(self, blocks: BlockSpan) -> Route:
        """Waits up to ``repair_timeout`` for somebody to take the place of what was lost."""
        view, clock = self._view, self._view.node.clock
        deadline = clock.monotonic() + view.config.repair_timeout
        while True:
            now = clock.monotonic()
            lost = self._lost.keys() & view.bans.at(now)
            needs = Needs(
                blocks=blocks,
                model=view.model,
                exclude=frozenset(lost | self._refused.keys()),
                is_training=self._is_training,
            )
            try:
                return await view.route(needs, throughput=True)
            except (MissingBlocksError, NoCapacity, TrainingRefused) as error:
                if lost and now < deadline:
                    await clock.sleep(min(_LOOK_AGAIN_SECONDS, deadline - now))
                    await view.refresh(older_than=_LOOK_AGAIN_SECONDS)
                elif self._refused or not lost:
                    raise next(reversed(self._refused.values()), error) from None
                else:
                    raise _nobody(blocks, view.model) from next(reversed(self._lost.values()))

    async def _learn(self, hop: Hop, error: PetalsError) -> None:
        """Remember why a server is no choice now. Raises the error if no other can help."""
        peer, view = hop.peer_id, self._view
        match error:
            case BadInput():
                raise error
            case BlocksNotServed():
                self._refused[peer] = error
                await view.refresh()
            case RequestError() | CacheFull():
                self._refused[peer] = error
            case PeerUnreachable() if peer not in self._called_again:
                # A stream may break although both ends live: each peer is called once more.
                self._called_again.add(peer)
            case PeerUnreachable() | PeerTimeout():
                self._lost[peer] = error
                view.note_failure(peer, error)
            case PeerError():
                self._num_refusals += 1
                view.note_failure(peer, error)
                if self._num_refusals > view.config.num_retries:
                    raise error
                await asyncio.sleep(view.config.backoff_seconds(self._num_refusals))
            case _:
                raise error


def _nobody(blocks: BlockSpan, model: str) -> MissingBlocksError:
    return MissingBlocksError(
        f"Nobody serves blocks {blocks} of {model} any more.",
        hint=f"Start somebody: petals serve {model} --blocks {blocks} --join ADDR. What was "
        "computed so far is lost; parameters and optimizer are yours and untouched.",
    )
