"""A micro-batch: some rows of a pass on their way through the swarm, forward and backward.

The client keeps the input of every hop until the backward pass, so that a server that fails, in
either direction, is replaced for its blocks alone, by one server or by several, and no other hop
computes anything twice. Knows routes and servers; knows no model and no tokens.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from petals.client.routing.failure_policy import History, Reaction, decide
from petals.client.routing.route import Needs
from petals.client.routing.swarm_state import SwarmState
from petals.client.training.hop_call import (
    Gradients,
    PassCall,
    PassLeg,
    PassOutput,
    run_backward,
    run_forward,
    within,
)
from petals.errors import (
    MissingBlocksError,
    NoCapacity,
    PeerTimeout,
    PeerUnreachable,
    PetalsError,
    TrainingRefused,
)
from petals.types import BlockSpan, Hop, PeerId, Route

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class PartialPass:
    """Hops one after the other, and the output of the last of them; None if that was not run."""

    legs: list[PassLeg]
    output: Tensor | None
    tapped: dict[int, Tensor]


class LostPeers:
    """The servers that a pass has found dead, and the errors that showed it.

    All micro-batches of the pass share this: as soon as one of them finds a server dead, the others
    stop waiting for that server (for a stream, for an adapter to be delivered, for a reply).
    Otherwise each of them would wait a whole ``silence_timeout``, one after the other.
    """

    def __init__(self) -> None:
        self.errors: dict[PeerId, PetalsError] = {}
        self._waiting: defaultdict[PeerId, set[asyncio.Task[Any]]] = defaultdict(set)

    def add(self, peer: PeerId, error: PetalsError) -> None:
        """``peer`` is dead, as ``error`` shows: every request to it that waits is cancelled."""
        self.errors[peer] = error
        for task in self._waiting[peer]:
            task.cancel()

    async def wait(self, peer: PeerId, asking: Coroutine[Any, Any, T]) -> T | None:
        """What ``asking`` returns or raises; None if another one finds ``peer`` dead."""
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
        swarm: SwarmState,
        blocks: BlockSpan,
        call: PassCall,
        *,
        is_training: bool,
        lost: LostPeers,
    ) -> None:
        self._swarm = swarm
        self._blocks = blocks
        self._call = call
        self._is_training = is_training
        self._legs: list[PassLeg] = []
        tensors = () if call.adapter is None else call.adapter.tensors
        self._wants_adapter = any(tensor.requires_grad for tensor in tensors)
        self._refused: dict[PeerId, PetalsError] = {}
        self._history = History(holds_state=True, max_failures=swarm.config.num_retries)
        self._lost = lost

    async def forward(self, hidden: Tensor) -> PassOutput:
        """hidden: [sum(counts), H]. Raises RouteError, the servers' refusals, PeerError."""
        passed = await self._forward_through(self._blocks, hidden)
        self._legs = passed.legs
        assert passed.output is not None
        return PassOutput(passed.output, passed.tapped)

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
            found = await self._ask(leg.hop, partial(run_backward, self._swarm, leg, given))
            if found is None:
                todo += (await self._forward_through(leg.hop.blocks, leg.hidden, to_last=True)).legs
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

    async def _forward_through(
        self, blocks: BlockSpan, hidden: Tensor, *, to_last: bool = False
    ) -> PartialPass:
        """Run ``blocks`` forward, around servers that fail; ``to_last``: all hops but the last."""
        legs: list[PassLeg] = []
        tapped: dict[int, Tensor] = {}
        while len(blocks):
            for hop in await self._route(blocks):
                own = within(self._call, self._blocks, hop.blocks)
                leg = PassLeg(hop, hidden, own, self._wants_adapter)
                if to_last and hop.blocks.end == blocks.end:
                    return PartialPass([*legs, leg], None, tapped)
                run = partial(run_forward, self._swarm, leg, is_training=self._is_training)
                output = await self._ask(hop, run)
                if output is None:
                    break
                if self._is_training:
                    legs.append(leg)
                hidden, tapped = output.hidden, tapped | output.tapped
                blocks = BlockSpan(hop.blocks.end, blocks.end)
        return PartialPass(legs, hidden, tapped)

    async def _ask(self, hop: Hop, ask: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """What the hop answers; None if it cannot, so that another server has to take its place."""
        if hop.peer_id in self._out_of_reach():
            return None
        try:
            answer = await self._lost.wait(hop.peer_id, ask())
        except PetalsError as error:
            error.peer_id = error.peer_id or hop.peer_id
            await self._react(hop.peer_id, error)
            return None
        if answer is not None:
            self._history = self._history.progressed()
        return answer

    def _out_of_reach(self) -> frozenset[PeerId]:
        """Servers that this pass has found dead and that are still banned."""
        return self._swarm.bans.at(self._swarm.node.clock.monotonic()) & self._lost.errors.keys()

    async def _route(self, blocks: BlockSpan) -> Route:
        """A route for ``blocks``. Where a lost server left a gap, waits for a replacement for at
        most ``repair_timeout``; raises MissingBlocksError, NoCapacity, the last refusal.
        """
        swarm, history = self._swarm, self._history
        while True:
            lost = self._out_of_reach()
            needs = Needs(
                blocks=blocks,
                model=swarm.model,
                exclude=frozenset(lost | self._refused.keys()),
                is_training=self._is_training,
            )
            try:
                in_haste = bool(lost or history.redialled)
                return await swarm.route(needs, throughput=True, in_haste=in_haste)
            except (MissingBlocksError, NoCapacity, TrainingRefused) as error:
                # Without a lost server none is expected to come back: waiting would be useless.
                seconds = swarm.config.repair_timeout if lost else 0.0
                now = swarm.node.clock.monotonic()
                history = replace(history, now=now, max_wait_seconds=seconds)
                decision = decide(error, history)
                if decision.reaction is Reaction.RAISE:
                    reason = self._reason(error, blocks, bool(lost))
                    raise reason from reason.__cause__
                history = history.after(error, decision)
                pause = swarm.config.failover.look_again_seconds
                await swarm.node.clock.sleep(min(pause, decision.max_pause_seconds))
                await swarm.refresh(older_than=pause)

    def _reason(self, error: PetalsError, blocks: BlockSpan, is_lost: bool) -> PetalsError:
        """The error when no route is left: the last refusal says most."""
        if self._refused or not is_lost:
            return next(reversed(self._refused.values()), error)
        missing = _missing(blocks, self._swarm.model)
        missing.__cause__ = next(reversed(self._lost.errors.values()))
        return missing

    async def _react(self, peer: PeerId, error: PetalsError) -> None:
        """Follow the failure policy. Raises the error if no other server can help."""
        decision = decide(error, self._history)
        self._history = self._history.after(error, decision)
        if decision.cause is not None:
            self._swarm.note_failure(peer, error, decision.cause)
        match decision.reaction:
            case Reaction.EXCLUDE:
                self._refused[peer] = error
                if decision.refresh:
                    await self._swarm.refresh()
            case Reaction.BAN if isinstance(error, PeerUnreachable | PeerTimeout):
                self._lost.add(peer, error)
            case Reaction.BAN:
                pause = self._swarm.config.backoff_seconds(self._history.num_failures)
                await self._swarm.node.clock.sleep(pause)
            case Reaction.RAISE | Reaction.WAIT:
                raise error


def _missing(blocks: BlockSpan, model: str) -> MissingBlocksError:
    return MissingBlocksError(
        f"No server has blocks {blocks} of {model} any more.",
        hint=f"Start a server: petals serve {model} --blocks {blocks} --join ADDR. What was "
        "computed so far is lost; parameters and optimizer are yours and untouched.",
    )
