"""Steps that come from other servers and go on to others: the ring that a client's states run in.

A step is run and its output handed to the next hop of its arc, or to the client. States are taken
only from the peers a client has named, in the epoch it has announced: what is older is dropped,
what is newer waits a moment for the announcement. Knows nothing of scheduling and of blocks.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import Tensor

from petals.errors import PeerBusy, PeerError, PetalsError, ProtocolError, SessionClosed
from petals.logs import get_logger
from petals.server.admission import validation
from petals.server.admission.offer import ServedModel
from petals.server.admission.peer_budget import ByteAllowance
from petals.server.compute.executor import Executor
from petals.server.compute.step_plan import StepPlan, TokenRun
from petals.server.network.peer_links import PeerLinks
from petals.server.session.output_log import OutboxRows
from petals.server.session.session import Session, SessionKey
from petals.server.session.table import SessionTable
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import MIB
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId, SessionId
from petals.wire import messages
from petals.wire.handshake import Refusal
from petals.wire.header import NextHops
from petals.wire.replies import ForwardFailed, ReplayDone, StepResult
from petals.wire.requests import Forwarded, ReplayRequest, Step

logger = get_logger(__name__)

HOLD_SECONDS = 1.0
"""How long a push of a newer epoch waits for that epoch to be announced."""
MAX_HELD_PER_PEER = 16
_MAX_PAGE_BYTES = 4 * MIB
"""So much is read from KV memory at once: batches of others wait for it."""

_ReplayedSteps = AsyncGenerator[tuple[Step, Sequence[Tensor]], None]


@dataclass(slots=True, eq=False)
class InboundStep:
    """A push and who it came from; ``channel`` is None if we are our own neighbour."""

    peer: PeerId
    channel: Channel | None
    push: ForwardedStep
    tensors: Sequence[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_relayed(self) -> bool:
        return self.channel is not None and self.channel.is_relayed

    async def refuse(self, error: PetalsError) -> None:
        if self.channel is not None:
            await self.channel.send(Refusal.of(error, self.push.step.step_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwarderParts:
    """What a ring shares with the door. ``chunk_tokens``: the most that one push of a replay
    holds.
    """

    offer: ServedModel
    sessions: SessionTable
    executor: Executor
    bytes: ByteAllowance
    node: SwarmNode
    chunk_tokens: int


class StepForwarder:
    """Runs the steps of all sessions and hands on what they put out; ``close`` it."""

    def __init__(self, parts: ForwarderParts) -> None:
        self._parts = parts
        self._links = PeerLinks(parts.node.open_channel, parts.node.clock)
        self._tasks = BackgroundTasks()
        self._held: dict[SessionKey, list[InboundStep]] = {}
        self._num_held: Counter[PeerId] = Counter()

    async def close(self) -> None:
        """End all steps and channels."""
        await self._tasks.close()
        await self._links.close()

    async def serve(self, channel: Channel) -> None:
        """Take what another server pushes (a ``swarm.rpc.Service``); only refusals go back."""
        while True:
            message, tensors = await channel.receive()
            if not isinstance(message, Forwarded):
                raise ProtocolError(f"{type(message).__name__} is not for the next hop of a ring.")
            arrival = InboundStep(channel.peer_id, channel, message, tensors)
            try:
                task = self._take(arrival)
            except PetalsError as error:
                await arrival.refuse(error)
                continue
            if message.step.replay and task is not None:
                await asyncio.wait({task})  # a replay must not run ahead of us

    def begin(
        self, session: Session, step: Step, tensors: Sequence[Tensor]
    ) -> "asyncio.Task[None]":
        """Run a step and hand on its output. The steps of a session run in the order of calls."""
        task = self._tasks.start(self._run(session, step, tensors), "step")
        session.adopt(task)
        return task

    def meet(self, peer: PeerId) -> None:
        """States will go on to ``peer``: connect to it now, so that the first step need not."""
        if peer != self._parts.node.peer_id:
            self._links.meet(peer)

    def replay(self, session: Session, message: ReplayRequest) -> None:
        """Push what ``session`` has put out to the hops that are to be refilled."""
        session.adopt(self._tasks.start(self._replay(session, message), "replay"))

    def reroute(self, session: Session, epoch: int, sources: Sequence[str]) -> None:
        """An epoch is announced; what has waited for it goes on."""
        if epoch < session.epoch:
            return
        session.epoch, session.sources = epoch, frozenset(sources)
        for arrival in self._held.pop(session.key, []):
            self._release(arrival)
            try:
                self._take(arrival)
            except PetalsError as error:
                self._tasks.start(arrival.refuse(error), "refusal")

    # What comes in

    def _take(self, arrival: InboundStep) -> "asyncio.Task[None] | None":
        """Begin a step, or hold it. Raises what its sender is to be refused with."""
        push, step = arrival.push, arrival.push.step
        session_id = SessionId(step.session_id)
        key = SessionKey(PeerId(push.client), session_id, messages.span(push.blocks))
        session = self._parts.sessions.get(key)
        if session is None:
            raise _not_here()
        if step.epoch > session.epoch:
            self._hold(key, arrival)
            return None
        if arrival.peer not in session.sources:
            raise _not_here()
        relayed = (*step.relayed, arrival.is_relayed)
        return self.begin(session, msgspec.structs.replace(step, relayed=relayed), arrival.tensors)

    def _hold(self, key: SessionKey, arrival: InboundStep) -> None:
        if self._num_held[arrival.peer] >= MAX_HELD_PER_PEER:
            raise PeerBusy("Too many steps wait for their epoch.", hint="Announce it first.")
        self._parts.bytes.reserve(arrival.peer, arrival.num_bytes)
        self._num_held[arrival.peer] += 1
        self._held.setdefault(key, []).append(arrival)
        self._tasks.start(self._expire(key, arrival), "waiting for an epoch")

    async def _expire(self, key: SessionKey, arrival: InboundStep) -> None:
        await self._parts.node.clock.sleep(HOLD_SECONDS)
        held = self._held.get(key, [])
        if arrival not in held:
            return
        held.remove(arrival)
        if not held:
            del self._held[key]
        try:
            await arrival.refuse(_not_here())
        finally:
            self._release(arrival)

    def _release(self, arrival: InboundStep) -> None:
        self._parts.bytes.release(arrival.peer, arrival.num_bytes)
        self._num_held[arrival.peer] -= 1
        if not self._num_held[arrival.peer]:
            del self._num_held[arrival.peer]

    # What goes out

    async def _run(self, session: Session, step: Step, tensors: Sequence[Tensor]) -> None:
        parts = self._parts
        try:
            # Held until the answer is on its way: a client that does not read runs out of it.
            with parts.bytes.hold(session.key.peer_id, sum(tensor.nbytes for tensor in tensors)):
                if step.replay and step.pages:
                    await self._put_pages(session, step, tensors)
                    return
                hidden = validation.only_states(parts.offer, tensors, sum(step.counts))
                answer = await session.step(step, hidden, parts.executor)
                if answer is not None and step.epoch == session.epoch:
                    await self._deliver_inbound(session, step, *answer)
        except PetalsError as error:
            if step.epoch >= session.epoch:
                await session.tell(Refusal.of(error, step.step_id))

    async def _put_pages(self, session: Session, step: Step, tensors: Sequence[Tensor]) -> None:
        offer, executor = self._parts.offer, self._parts.executor
        given = validation.pages_and_outputs(offer, session.kv, session.out_dtype, step, tensors)
        if await session.put_pages(step, *given, executor) and step.ends:
            await session.tell(ReplayDone(step.session_id, step.epoch))

    async def _deliver_inbound(
        self, session: Session, step: Step, result: StepResult, hidden: Tensor
    ) -> None:
        undelivered: NextHops = ()
        if step.next_hops:
            timing = (result.queue_seconds, result.compute_seconds, result.batch_tokens)
            onward = msgspec.structs.replace(step, timings=(*step.timings, timing))
            undelivered = await self._forward(session, onward, (hidden,))
            if not undelivered:
                return
        if not step.replay:
            result = msgspec.structs.replace(result, undelivered=undelivered)
            await session.tell(result, (hidden,))
        elif step.ends or undelivered:
            await session.tell(ReplayDone(step.session_id, step.epoch, undelivered))

    async def _forward(self, session: Session, step: Step, tensors: Sequence[Tensor]) -> NextHops:
        """Hand a step to the first of its next hops. Returns those that it did not reach."""
        (next_hop, *rest), own_id = step.next_hops, self._parts.node.peer_id
        onward = msgspec.structs.replace(step, next_hops=tuple(rest))
        push = Forwarded(session.key.peer_id, next_hop.blocks, onward)
        if next_hop.peer_id == own_id:
            task = self._take(InboundStep(own_id, None, push, tensors))
            if step.replay and task is not None:
                await asyncio.wait({task})
            return ()
        replay_of = step.session_id if step.replay else b""
        on_lost = partial(self._tell_of_loss, session, step)
        try:
            await self._links.send(
                PeerId(next_hop.peer_id), push, tensors, on_lost, replay_of=replay_of
            )
        except PeerError as error:
            logger.info("a step of session %s goes via its client: %s", session.key, error.message)
            return step.next_hops
        return ()

    async def _tell_of_loss(self, session: Session, step: Step) -> None:
        """The lane broke that took what ``step`` has put out, perhaps with it."""
        if step.epoch == session.epoch:
            await session.tell(
                ForwardFailed(step.session_id, step.epoch, step.step_id, step.replay)
            )

    async def _replay(self, session: Session, message: ReplayRequest) -> None:
        steps = self._pages_of if message.pages else self._outputs_of
        try:
            async with aclosing(steps(session, message)) as given:
                async for step, tensors in given:
                    if session.epoch != message.epoch:
                        return
                    if not step.next_hops:
                        await session.tell(step, tensors)
                        continue
                    undelivered = await self._forward(session, step, tensors)
                    if undelivered:
                        await session.tell(ReplayDone(step.session_id, step.epoch, undelivered))
                        return
        except PetalsError as error:
            await session.tell(Refusal.of(error, message.step_id))

    async def _outputs_of(self, session: Session, message: ReplayRequest) -> _ReplayedSteps:
        """What the session has put out, step by step."""
        found = await session.outputs(message)
        if found is None:
            return
        rows, plan, is_reordered = found
        for step, pieces in _replay_steps(message, plan, self._parts.chunk_tokens):
            step = msgspec.structs.replace(step, reordered=is_reordered)
            yield step, (self._joined(session, rows, pieces),)

    async def _pages_of(self, session: Session, message: ReplayRequest) -> _ReplayedSteps:
        """What the session's blocks keep, and what it has put out, unless that was dropped."""
        found = await session.copy(message)
        if found is None:
            return
        copy, rows = found
        token_bytes = session.kv.layout.token_bytes(session.key.blocks)
        num_tokens = min(self._parts.chunk_tokens, max(1, _MAX_PAGE_BYTES // max(1, token_bytes)))
        for step, pieces in _replay_steps(message, copy.plan, num_tokens):
            pages = await session.read(copy, pieces, self._parts.executor)
            outputs = () if rows is None else (self._joined(session, rows, pieces),)
            yield msgspec.structs.replace(step, pages=True), (pages, *outputs)

    def _joined(self, session: Session, rows: OutboxRows, pieces: Sequence[TokenRun]) -> Tensor:
        """These tokens of an outbox: [tokens, H]."""
        empty = torch.empty(0, self._parts.offer.hidden_size, dtype=session.out_dtype)
        return torch.cat([empty, *rows.read(pieces)])


def _replay_steps(
    message: ReplayRequest, plan: StepPlan, max_tokens: int
) -> Iterator[tuple[Step, list[TokenRun]]]:
    """The steps of a replay, and what each of them carries. At least one, if only to end it."""
    starts = list(plan.starts)
    # As many rows as ours, whatever is there: all of them begin anew, or go on as they are told to.
    reorder = (0,) * len(starts) if plan.reorder is None else plan.reorder
    for done in range(0, max(plan.num_tokens, 1), max_tokens):
        pieces = list(plan.pieces(done, max_tokens))
        counts = [0] * len(starts)
        for piece in pieces:
            counts[piece.row] = piece.count
        step = Step(
            session_id=message.session_id,
            epoch=message.epoch,
            step_id=message.step_id,
            starts=tuple(starts),
            counts=tuple(counts),
            reorder=None if done else reorder,
            next_hops=message.next_hops,
            replay=True,
            ends=done + max_tokens >= plan.num_tokens,
        )
        yield step, pieces
        starts = [start + count for start, count in zip(starts, counts)]


def _not_here() -> SessionClosed:
    """One answer for sessions that are not here and for those that are none of the asker's."""
    return SessionClosed(
        "There is no such session here.", hint="Its client names who may send states for it."
    )
