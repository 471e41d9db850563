"""One server, from a config to a clean end, as a list one can read.

Everything long (loading, the self-test, timing) runs on the compute thread, so that the event loop
answers meanwhile. Knows the order of things and leaves the things to others.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import torch

import petals
from petals import constants
from petals.clock import Clock, SystemClock
from petals.errors import BlocksNotServed, SessionClosed
from petals.logs import get_logger
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading import cost
from petals.models.loading.quantize import QuantKind
from petals.server.compute.executor import Executor
from petals.server.compute.scheduler import Scheduler
from petals.server.config import ServerConfig
from petals.server.lifecycle import memory, placement, throughput
from petals.server.lifecycle.announcer import Announcer
from petals.server.lifecycle.mover import Mover
from petals.server.lifecycle.served_span import ModelPlan, ServedSpan, ServerContext, release_memory
from petals.swarm.config import Engine
from petals.swarm.directory.records import ServerRecord
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from petals.wire.frames import PROTOCOL_VERSION

logger = get_logger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""A step is handed between loop and compute thread at least twice; 5 ms each would show."""


@dataclass(frozen=True, slots=True)
class OnlineInfo:
    """What is told once, when the server has come online."""

    peer_id: PeerId
    model: ModelId
    blocks: BlockSpan
    addresses: tuple[str, ...]
    dtype: str
    quant: str
    max_length: int
    cache_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchers:
    """Who wants to know how a start goes on.

    ``on_stage`` gets a sentence at each stage, ``on_loading`` (bytes read, bytes to read), from
    another thread; ``on_online`` is called in the event loop, again after every move.
    """

    on_stage: Callable[[str], None] = lambda text: None
    on_loading: Callable[[int, int], None] = lambda done, total: None
    on_online: Callable[[OnlineInfo], None] = lambda info: None


class Server:
    """Serves some blocks of a model, once: ``run`` it until ``stop`` is called, or use it as an
    async context manager, inside of which it is online. ``info`` then says who and what it is.

    A server that has chosen its blocks itself may go to others meanwhile.
    """

    def __init__(
        self,
        config: ServerConfig,
        watchers: Watchers | None = None,
        *,
        engine: Engine | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self._watchers = watchers or Watchers()
        self._engine = engine
        self._clock = clock or SystemClock()
        self.info: OnlineInfo | None = None
        self._online = asyncio.Event()
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> "Server":
        self._task = asyncio.create_task(self.run(), name="server")
        online = asyncio.create_task(self._online.wait())
        try:
            await asyncio.wait({self._task, online}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.stop()
            raise
        finally:
            online.cancel()
        if self._task.done():
            self._task.result()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    async def run(self) -> None:
        """Start, serve, leave; returns after ``stop``.

        Raises ConfigError (the model, the options, too little memory), SwarmError (bootstrap,
        admission) and ModelNotSupported (the self-test fails). The directory says OFFLINE and
        nothing is left running in any case.
        """
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            async with AsyncExitStack() as stack:
                await self._serve(stack)
        except asyncio.CancelledError:
            # ``stop`` cancels a start that is under way; any other cancellation is not ours.
            if not self._stop.is_set():
                raise
            self._task.uncancel()

    def stop(self) -> None:
        """Leave: let clients hand their sessions over, for ``drain_seconds``, and tell everybody.

        Called once more: leave at once, as soon as the steps under way are done.
        """
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()
        if not self._online.is_set() and self._task is not None:
            self._task.cancel()

    async def _serve(self, stack: AsyncExitStack) -> None:
        config, say = self.config, self._watchers.on_stage
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        scheduler = Scheduler(config.scheduling)
        executor = await stack.enter_async_context(Executor(scheduler))
        say(f"Looking at {config.source.model}")
        model = await executor.call(self._look_at_model)
        say("Joining the swarm")
        node = SwarmNode(config.network, engine=self._engine, clock=self._clock)
        await stack.enter_async_context(node)
        await self._become_reachable(node, model)
        announcer = await self._join(stack, node, model)
        site = ServerContext(
            config=config,
            model=model,
            scheduler=scheduler,
            executor=executor,
            node=node,
            announcer=announcer,
            go_on=self._go_on,
            on_loading=self._watchers.on_loading,
        )
        blocks: BlockSpan | None = announcer.record.block_spans[0]
        while blocks is not None:
            blocks = await self._stay(site, blocks)

    async def _stay(self, site: ServerContext, blocks: BlockSpan) -> BlockSpan | None:
        """Serve ``blocks`` until it is time to leave; returns where to, None for away."""
        say = self._watchers.on_stage
        say(f"Loading blocks {blocks} of {len(site.model.costs)}")
        async with ServedSpan(site, blocks) as stay:
            self.info = await self._online_info(site, stay)
            self._online.set()
            say(f"Online: blocks {blocks} ({stay.mode})")
            self._watchers.on_online(self.info)
            moves_to = await self._until_it_is_time(site, stay)
            num_sessions = len(stay.service.sessions)
            say("Draining" if moves_to is None else f"Moving to blocks {moves_to}")
            if num_sessions:
                say(f"{num_sessions} sessions may stay for up to {self.config.drain_seconds:g} s")
            await stay.leave(self._at_once, moves_to)
            if self._stop.is_set() or moves_to is None:
                return None
            self._online.clear()
        await site.executor.call(release_memory)
        spans = ((moves_to.start, moves_to.end),)
        await site.announcer.announce(state=ServerState.JOINING, spans=spans, next_spans=())
        return moves_to

    async def _until_it_is_time(self, site: ServerContext, stay: ServedSpan) -> BlockSpan | None:
        """Returns at ``stop``, or with the blocks to move to."""
        stopped = asyncio.create_task(self._stop.wait())
        if self.config.blocks is not None or not self.config.moving.enabled:
            await stopped
            return None
        moving = self.config.moving
        mover = Mover(site.node, site.model.id, len(site.model.costs), moving, self._clock)
        moved = asyncio.create_task(mover.next_blocks(stay), name="looking for better blocks")
        try:
            await asyncio.wait({stopped, moved}, return_when=asyncio.FIRST_COMPLETED)
            return moved.result() if moved.done() and not stopped.done() else None
        finally:
            for task in (stopped, moved):
                task.cancel()
            await asyncio.wait({stopped, moved})

    def _look_at_model(self) -> ModelPlan:
        source, compute = self.config.source, self.config.compute
        torch.set_num_threads(throughput.choose_threads(compute.num_threads))
        access = HubAccess(revision=source.revision, token=source.token, cache_dir=source.cache_dir)
        checkpoint = open_checkpoint(source.model, access)
        _ = checkpoint.weight_map  # weights that cannot be read are refused before we join
        device = throughput.find_device(compute.device)
        stored = cost.compute_dtype(checkpoint.config, None)
        precision = throughput.choose_precision(compute, stored, device, constants.cache_dir())
        costs = cost.block_costs(checkpoint.config, dtype=precision.dtype, quant=precision.quant)
        asked = self.config.blocks
        if asked is not None and asked.end > len(costs):
            raise BlocksNotServed(
                f"{source.model} has blocks 0:{len(costs)}, not {asked}.",
                hint=f"Choose START:END inside 0:{len(costs)}.",
            )
        name = source.name or checkpoint.model_id
        return ModelPlan(checkpoint, name, precision, device, costs)

    async def _become_reachable(self, node: SwarmNode, model: ModelPlan) -> None:
        view = await node.directory.view(model.id, len(model.costs))
        members = [PeerId(r.peer_id) for r in view.records.values() if not r.relayed]
        if await node.become_reachable(members):
            self._watchers.on_stage("Others cannot dial this server: it is reached through relays")

    async def _join(self, stack: AsyncExitStack, node: SwarmNode, model: ModelPlan) -> Announcer:
        """Choose blocks and announce that they are coming."""
        blocks = self.config.blocks or await self._choose_blocks(node, model, ())
        announcer = Announcer(
            node.directory,
            self._first_record(node, model, blocks),
            model.checkpoint.public_name,
            self.config.announce,
            self._clock,
        )
        await stack.enter_async_context(announcer)
        if self.config.blocks is None:
            # Several servers that start together see the same gap; they must not all fill it.
            view = await node.directory.view(model.id, len(model.costs), whole=True)
            if placement.must_yield(view, blocks, node.peer_id):
                again = await self._choose_blocks(node, model, (node.peer_id,))
                await announcer.announce(spans=((again.start, again.end),))
        return announcer

    async def _choose_blocks(
        self, node: SwarmNode, model: ModelPlan, without: Sequence[PeerId]
    ) -> BlockSpan:
        budget = self.config.memory
        capacity = memory.plan_capacity(
            model.costs,
            memory.free_memory_bytes(model.device),
            num_blocks=self.config.num_blocks,
            cache_tokens=budget.cache_tokens,
        )
        view = await node.directory.view(model.id, len(model.costs), whole=True)
        picture = placement.picture_of(view, without)
        return placement.choose_blocks(picture, capacity.num_blocks)

    def _first_record(self, node: SwarmNode, model: ModelPlan, blocks: BlockSpan) -> ServerRecord:
        precision = model.precision
        return ServerRecord(
            peer_id=node.peer_id,
            model=model.id,
            num_blocks=len(model.costs),
            spans=((blocks.start, blocks.end),),
            state=ServerState.JOINING,
            expires_at=0.0,
            dtype=str(precision.dtype).removeprefix("torch."),
            quant=None if precision.quant is QuantKind.NONE else str(precision.quant),
            version=petals.__version__,
            protocol_version=PROTOCOL_VERSION,
            public_name=self.config.announce.public_name,
        )

    def _go_on(self) -> None:
        """Called now and then on the compute thread, so that a start can be broken off."""
        if self._stop.is_set():
            raise SessionClosed("The start was broken off.", hint="Start the server again.")

    async def _online_info(self, site: ServerContext, stay: ServedSpan) -> OnlineInfo:
        offer = stay.offer
        return OnlineInfo(
            peer_id=site.node.peer_id,
            model=offer.model,
            blocks=offer.blocks,
            addresses=await site.node.addresses(),
            dtype=offer.dtype,
            quant=str(site.model.precision.quant),
            max_length=offer.max_length,
            cache_tokens=stay.pool.tokens_total,
        )


def run_until_signalled(server_of: Callable[[], Server]) -> None:
    """Run a server in an event loop of its own until SIGTERM or SIGINT ends it cleanly, at the
    second of them at once.

    ``server_of`` makes the server inside the loop. Raises what ``Server.run`` raises.
    """

    async def main() -> None:
        server = server_of()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, server.stop)
        await server.run()

    asyncio.run(main())
