"""Steps and replays on their way through servers: taken in, run, forwarded to the next hop.

All steps run here, whether their client or another server has sent them. How epochs keep servers in
agreement without talking to each other:

- Only the client knows which hops make up the session, so only the client begins epochs.
- It announces an epoch to every hop on that hop's own channel, so two hops learn of it at different
  times. A hop that knows may forward a step to a hop that does not know yet. That step is *held*
  for a moment instead of refused: the client's announcement is on its way.
- A hop that was replaced does not know that it is out. What it still forwards has an old epoch, or
  comes from a peer that is no source any more, and is dropped or refused here.
- A step is forwarded only if its epoch is still the session's once it has run: its next hops belong
  to the old epoch otherwise. The client repeats the step in the new epoch, and the answer comes
  from the output log.

Knows nothing of scheduling and of blocks.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
from torch import Tensor

from petals.errors import BadInput, PeerBusy, PeerError, PetalsError, ProtocolError, SessionClosed
from petals.logs import get_logger
from petals.server.admission.validation import PeerByteBudget
from petals.server.network.peer_links import PeerLinks
from petals.server.session.session import Session, SessionKey, StepOutput
from petals.server.session.table import SessionTable
from petals.swarm.background import BackgroundTasks
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.types import PeerId, SessionId
from petals.wire.handshake import Refusal
from petals.wire.header import NextHops, RequestHeader
from petals.wire.replies import ForwardFailed, ReplayDone, StepResult
from petals.wire.requests import BeginEpoch, Forwarded, ReplayPart, ReplayRequest, Step

logger = get_logger(__name__)

MAX_SEGMENT_HOPS = 128
"""Longest direct segment. Every hop adds to what a step reports of the hops passed, and a peer
takes no message whose report is too long.
"""


@dataclass(frozen=True, slots=True, eq=False)
class InboundMessage:
    """What another server has forwarded, and on which channel."""

    channel: Channel
    forwarded: Forwarded
    tensors: Sequence[Tensor]

    @property
    def peer(self) -> PeerId:
        return self.channel.peer_id

    @property
    def header(self) -> RequestHeader:
        return self.forwarded.message.header

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class StepForwarder:
    """Runs the steps and replays of all sessions and forwards their outputs; ``close`` it.

    replay_tokens: most tokens in one part of a replay.
    """

    def __init__(
        self,
        sessions: SessionTable,
        bytes_: PeerByteBudget,
        node: SwarmNode,
        limits: FailoverConfig,
        replay_tokens: int,
    ) -> None:
        self._sessions = sessions
        self._bytes = bytes_
        self._clock = node.clock
        self._peer_id = node.peer_id
        self._limits = limits
        self._replay_tokens = replay_tokens
        self._links = PeerLinks(node.open_channel, node.clock, limits)
        self._tasks = BackgroundTasks()
        self._held: dict[SessionKey, list[InboundMessage]] = {}
        self._num_held: Counter[PeerId] = Counter()

    @property
    def is_idle(self) -> bool:
        """Whether no message is held for its epoch."""
        return not self._held

    async def close(self) -> None:
        """End all channels. The tasks of sessions end with the sessions."""
        await self._tasks.close()
        await self._links.close()

    async def serve(self, channel: Channel) -> None:
        """Take what another server forwards (a ``swarm.rpc.Service``); only refusals go back."""
        while True:
            message, tensors = await channel.receive()
            if not isinstance(message, Forwarded):
                raise ProtocolError(f"{type(message).__name__} is not for the next hop of a step.")
            inbound = InboundMessage(channel, message, tensors)
            try:
                task = self._take(inbound)
            except PetalsError as error:
                await self._refuse(inbound, error)
                continue
            if task is not None and isinstance(message.message, ReplayPart):
                # The sender of a replay has no other reason to wait than our credit: without this,
                # the parts of a long replay would pile up here.
                await asyncio.wait({task})

    def run(
        self, session: Session, message: Step | ReplayPart, tensors: Sequence[Tensor]
    ) -> "asyncio.Task[None]":
        """Run a step or a part of a replay and forward or return its output.

        Those of a session run in the order of the calls. Raises what ``Session.start`` raises and
        BadInput for next hops that cannot be.
        """
        self._check_next_hops(message)
        return session.start(self._run(session, message, tensors), type(message).__name__)

    def replay(self, session: Session, request: ReplayRequest) -> None:
        """Send what ``session`` has put out to the hops that are to be filled.

        Raises what ``run`` raises.
        """
        self._check_next_hops(request)
        session.start(self._replay(session, request), "replay")

    def connect(self, peer: PeerId) -> None:
        """Open the link to a next hop now, so that the first step does not wait for it."""
        if peer != self._peer_id:
            self._links.connect(peer)

    def begin_epoch(self, session: Session, message: BeginEpoch) -> None:
        """The client begins an epoch: what was held for it is taken now, in order of arrival."""
        session.begin_epoch(message.header.epoch, message.sources)
        held = self._held.pop(session.key, [])
        early = [inbound for inbound in held if inbound.header.epoch > session.epoch]
        if early:
            self._held[session.key] = early
        for inbound in held:
            if inbound in early:
                continue
            self._release(inbound)
            try:
                self._take(inbound)
            except PetalsError as error:
                # In a task of its own: its sender may not read, and this is the client's channel.
                self._tasks.start(self._refuse(inbound, error), "refusal")

    # -- what comes in

    def _take(self, inbound: InboundMessage) -> "asyncio.Task[None] | None":
        """Run a message, or hold it (None). Raises what its sender is refused with.

        A peer that is no source gets the same answer as for a session that does not exist, so that
        it does not learn which sessions do.
        """
        message, header = inbound.forwarded.message, inbound.header
        client = PeerId(inbound.forwarded.client)
        session = self._sessions.get(SessionKey(client, SessionId(header.session_id)))
        if session is None:
            raise _not_here()
        if header.epoch > session.epoch:
            self._hold(session.key, inbound)
            return None
        if inbound.peer not in session.sources:
            raise _not_here()
        if isinstance(message, Step):
            relayed = (*message.relayed, inbound.channel.is_relayed)
            message = msgspec.structs.replace(message, relayed=relayed)
        return self.run(session, message, inbound.tensors)

    def _hold(self, key: SessionKey, inbound: InboundMessage) -> None:
        if self._num_held[inbound.peer] >= self._limits.max_held_per_peer:
            raise PeerBusy("Too many messages wait for their epoch.", hint="Begin the epoch first.")
        # Until the epoch begins, it is unknown whether the client wants this peer's messages: they
        # count against the peer itself.
        self._bytes.reserve(inbound.peer, inbound.num_bytes)
        self._num_held[inbound.peer] += 1
        self._held.setdefault(key, []).append(inbound)
        self._tasks.start(self._expire(key, inbound), "waiting for an epoch")

    async def _expire(self, key: SessionKey, inbound: InboundMessage) -> None:
        await self._clock.sleep(self._limits.epoch_hold_seconds)
        held = self._held.get(key, [])
        if inbound not in held:
            return
        held.remove(inbound)
        if not held:
            del self._held[key]
        self._release(inbound)
        await self._refuse(inbound, _not_here())

    def _release(self, inbound: InboundMessage) -> None:
        self._bytes.release(inbound.peer, inbound.num_bytes)
        self._num_held[inbound.peer] -= 1
        if not self._num_held[inbound.peer]:
            del self._num_held[inbound.peer]

    async def _refuse(self, inbound: InboundMessage, error: PetalsError) -> None:
        refusal = Refusal.of(error, inbound.header)
        await inbound.channel.send(refusal)

    def _check_next_hops(self, message: Step | ReplayPart | ReplayRequest) -> None:
        """Raises BadInput."""
        hops = message.next_hops
        num_passed = 0
        if isinstance(message, Step):
            num_passed = max(len(message.timings), len(message.relayed))
        if num_passed + len(hops) > MAX_SEGMENT_HOPS:
            raise BadInput(
                f"A direct segment may have {MAX_SEGMENT_HOPS} hops.",
                hint="Let the output of one of the hops come back to the client.",
            )
        if hops and hops[0].peer_id == self._peer_id:
            raise BadInput(
                "This server was asked to forward to itself.",
                hint="Reserve all of its blocks at once, or let the output come back in between.",
            )
        if isinstance(message, Step) or not message.kv:
            return
        if len(hops) != (1 if isinstance(message, ReplayRequest) else 0):
            raise BadInput(
                "Keys and values go from one server to one other, and no further.",
                hint="Give a replay of keys and values one next hop.",
            )

    # -- what goes out

    async def _run(
        self, session: Session, message: Step | ReplayPart, tensors: Sequence[Tensor]
    ) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        try:
            # Counted until the answer is on its way: a client that does not read uses up its share.
            with self._bytes.hold(session.key.peer_id, num_bytes):
                if isinstance(message, Step):
                    output = await session.step(message, tensors)
                    if output is not None:
                        await self._deliver(session, message, output)
                else:
                    filled = await session.fill(message, tensors)
                    if filled is not None:
                        await self._pass_replay_on(session, message, filled)
        except PetalsError as error:
            await session.reply(Refusal.of(error, message.header))

    async def _deliver(self, session: Session, step: Step, output: StepOutput) -> None:
        """Forward the output of a step; to the client if it has no next hop, or cannot reach it."""
        undelivered: NextHops = ()
        if step.next_hops:
            onward = msgspec.structs.replace(step, timings=(*step.timings, output.timing))
            undelivered = await self._forward(session, onward, (output.hidden,))
            if not undelivered:
                return
        queue_seconds, compute_seconds, batch_tokens = output.timing
        result = StepResult(
            header=step.header,
            queue_seconds=queue_seconds,
            compute_seconds=compute_seconds,
            batch_tokens=batch_tokens,
            timings=step.timings,
            undelivered=undelivered,
            relayed=step.relayed,
        )
        await session.reply(result, (output.hidden,))

    async def _pass_replay_on(
        self, session: Session, part: ReplayPart, outputs: Sequence[Tensor]
    ) -> None:
        undelivered = await self._forward(session, part, outputs) if part.next_hops else ()
        if undelivered or (part.ends and not part.next_hops):
            await session.reply(ReplayDone(part.header, undelivered))

    async def _forward(
        self, session: Session, message: Step | ReplayPart, tensors: Sequence[Tensor]
    ) -> NextHops:
        """Send a message to the first of its next hops. Returns the hops that it cannot reach."""
        next_hop, *rest = message.next_hops
        header = msgspec.structs.replace(message.header, session_id=next_hop.session_id)
        onward = msgspec.structs.replace(message, header=header, next_hops=tuple(rest))
        forwarded = Forwarded(session.key.peer_id, onward)
        # If the link breaks later, the report carries the header of the request received here.
        on_lost = partial(session.reply, ForwardFailed(message.header))
        replay_of = session.key if isinstance(message, ReplayPart) else None
        try:
            peer = PeerId(next_hop.peer_id)
            await self._links.send(peer, forwarded, tensors, on_lost, replay_of=replay_of)
        except PeerError as error:
            logger.info("session %s goes through its client: %s", session.key, error.message)
            return message.next_hops
        return ()

    async def _replay(self, session: Session, request: ReplayRequest) -> None:
        stream = session.replay(request, self._replay_tokens, self._limits.kv_part_bytes)
        try:
            async with aclosing(stream) as parts:
                async for part, tensors in parts:
                    if session.is_outdated(request.header):
                        return
                    if not part.next_hops:
                        await session.reply(part, tensors)
                        continue
                    undelivered = await self._forward(session, part, tensors)
                    if undelivered:
                        await session.reply(ReplayDone(request.header, undelivered))
                        return
        except PetalsError as error:
            await session.reply(Refusal.of(error, request.header))


def _not_here() -> SessionClosed:
    return SessionClosed(
        "There is no such session here.", hint="Its client names who may send states for it."
    )
