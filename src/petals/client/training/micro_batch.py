"""Some rows of a pass on their way through the swarm, forward and back.

The input of every hop is kept for the way back, so that a server that fails, in either direction,
is replaced from where it failed and nothing else is done twice: its range alone is run again, by
one server or by several. Knows routes and servers; knows no model and no tokens.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from petals.client.block_runner import PassCall, PassOutput
from petals.client.routing.route import Needs
from petals.client.routing.swarm_state import SwarmState
from petals.client.training.hop_call import Gradients, Leg, run_backward, run_forward, within
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
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class PartialPass:
    """Hops one after the other, and what came out of the last of them; None: it was left out."""

    legs: list[Leg]
    output: Tensor | None
    tapped: dict[int, Tensor]


class LostPeers:
    """The servers that a pass has found dead, and how; one is enough to find it.

    Its micro-batches share this: whoever waits for a server then, for a stream, for its turn or for
    an answer, waits no longer.
    """

    def __init__(self) -> None:
        self.errors: dict[PeerId, PetalsError] = {}
        self._waiting: defaultdict[PeerId, set[asyncio.Task[Any]]] = defaultdict(set)

    def add(self, peer: PeerId, error: PetalsError) -> None:
        """``peer`` is dead; that is what ``error`` says."""
        self.errors[peer] = error
        for task in self._waiting[peer]:
            task.cancel()

    async def wait(self, peer: PeerId, asking: Coroutine[Any, Any, T]) -> T | None:
        """What ``asking`` returns or raises; None if somebody else finds ``peer`` dead first."""
        task = asyncio.create_task(asking)
        self._waiting[peer].add(task)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if peer not in self.errors or (caller is not None and caller.cancelling()):
                raise
            return None
        finally:
            self._waiting[peer].discard(task)


class MicroBatch:
    """Whole rows through ``blocks``. ``forward`` once, then ``backward`` as often as asked.

    ``lost`` is shared by the micro-batches of a pass.
    """

    def __init__(
        self,
        view: SwarmState,
        blocks: BlockSpan,
        call: PassCall,
        *,
        is_training: bool,
        lost: LostPeers,
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
        self._lost = lost

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
            given = replace(grads, hidden=grad)
            found = await self._ask(leg.hop, partial(run_backward, self._view, leg, given))
            if found is None:
                todo += (await self._walk(leg.hop.blocks, leg.hidden, to_last=True)).legs
                continue
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

    async def _walk(
        self, blocks: BlockSpan, hidden: Tensor, *, to_last: bool = False
    ) -> PartialPass:
        """Through ``blocks``, around those who fail; ``to_last``: not through the last hop."""
        legs: list[Leg] = []
        tapped: dict[int, Tensor] = {}
        while len(blocks):
            for hop in await self._route(blocks):
                own = within(self._call, self._blocks, hop.blocks)
                leg = Leg(hop, hidden, own, self._wants_adapter)
                if to_last and hop.blocks.end == blocks.end:
                    return PartialPass([*legs, leg], None, tapped)
                run = partial(run_forward, self._view, leg, is_training=self._is_training)
                output = await self._ask(hop, run)
                if output is None:
                    break
                if self._is_training:
                    legs.append(leg)
                hidden, tapped = output.hidden, tapped | output.tapped
                blocks = BlockSpan(hop.blocks.end, blocks.end)
        return PartialPass(legs, hidden, tapped)

    async def _ask(self, hop: Hop, ask: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """What the hop answers; None if it cannot, and another has to take its place."""
        if hop.peer_id in self._out_of_reach():
            return None
        try:
            answer = await self._lost.wait(hop.peer_id, ask())
        except PetalsError as error:
            await self._learn(hop, error)
            return None
        if answer is not None:
            self._num_refusals = 0
        return answer

    def _out_of_reach(self) -> frozenset[PeerId]:
        """Those who were found dead, until their bans end."""
        return self._view.bans.at(self._view.node.clock.monotonic()) & self._lost.errors.keys()

    async def _route(self, blocks: BlockSpan) -> Route:
        """Waits up to ``repair_timeout`` for somebody to take the place of what was lost."""
        view, clock = self._view, self._view.node.clock
        deadline = clock.monotonic() + view.config.repair_timeout
        while True:
            lost = self._out_of_reach()
            needs = Needs(
                blocks=blocks,
                model=view.model,
                exclude=frozenset(lost | self._refused.keys()),
                is_training=self._is_training,
            )
            try:
                in_haste = bool(lost or self._called_again)
                return await view.route(needs, throughput=True, in_haste=in_haste)
            except (MissingBlocksError, NoCapacity, TrainingRefused) as error:
                if lost and (left := deadline - clock.monotonic()) > 0:
                    await clock.sleep(min(_LOOK_AGAIN_SECONDS, left))
                    await view.refresh(older_than=_LOOK_AGAIN_SECONDS)
                elif self._refused or not lost:
                    raise next(reversed(self._refused.values()), error) from None
                else:
                    last_error = next(reversed(self._lost.errors.values()))
                    raise _nobody(blocks, view.model) from last_error

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
                view.note_failure(peer, error)
                self._lost.add(peer, error)
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
