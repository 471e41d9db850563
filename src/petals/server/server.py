"""One server, from its config to its end, as a list of steps.

Everything long (loading, the self-test, timing) runs on the compute thread, so that the event loop
answers peers meanwhile. Knows the order of the steps; each step is in a module of its own.
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
from petals.errors import SessionClosed
from petals.logs import get_logger, plural
from petals.models.checkpoint.glance import check_blocks
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading import cost
from petals.models.loading.loadable import check_quant, check_weights, config_in_memory
from petals.models.loading.quantize import QuantKind
from petals.server.compute.executor import Executor
from petals.server.compute.scheduler import Scheduler
from petals.server.config import ServerConfig
from petals.server.lifecycle import memory, placement, throughput
from petals.server.lifecycle.announcer import Announcer
from petals.server.lifecycle.mover import Mover
from petals.server.lifecycle.served_span import ModelPlan, ServedSpan, ServerContext, release_memory
from petals.swarm.background import run_until
from petals.swarm.config import Engine
from petals.swarm.directory.records import ServerRecord
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from petals.wire.frames import PROTOCOL_VERSION

logger = get_logger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""Python's switch interval. A step passes between event loop and compute thread at least twice;
with the default of 5 ms each time would delay a token visibly.
"""


@dataclass(frozen=True, slots=True)
class OnlineInfo:
    """Facts about a server that has come online."""

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
    """Callbacks that follow the life of a server.

    ``on_stage``: a sentence at each stage. ``on_loading``: (bytes read, bytes to read), called on
    the compute thread. ``on_online``: called on the event loop, again after every move.
    """

    on_stage: Callable[[str], None] = lambda text: None
    on_loading: Callable[[int, int], None] = lambda done, total: None
    on_online: Callable[[OnlineInfo], None] = lambda info: None


class Server:
    """Serves some blocks of a model, once: ``run`` it until ``stop`` is called, or use it as an
    async context manager, inside of which it is online (``info``).

    A server that has chosen its blocks itself may move to others while it runs.
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
        try:
            # A start that fails ends the task before the server is online, and raises here.
            await run_until(self._online, asyncio.shield(self._task))
        except asyncio.CancelledError:
            self.stop()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    async def run(self) -> None:
        """Start, serve, leave; returns after ``stop``.

        Raises ConfigError (the model, the options, too little memory), SwarmError (bootstrap,
        admission), ModelNotSupported (the self-test fails) and PeerFailed (the compute thread has
        failed). In any case the directory says OFFLINE afterwards and nothing is left running.
        """
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            async with AsyncExitStack() as stack:
                await self._serve(stack)
        except asyncio.CancelledError:
            # ``stop`` cancels a start that is under way; any other cancellation is the caller's.
            if not self._stop.is_set():
                raise
            self._task.uncancel()

    def stop(self) -> None:
        """Leave: announce it, and let clients migrate their sessions for ``drain_seconds``.

        Called once more: leave as soon as the running steps are done.
        """
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()
        if not self._online.is_set() and self._task is not None:
            self._task.cancel()

    async def _serve(self, stack: AsyncExitStack) -> None:
        config, report = self.config, self._watchers.on_stage
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        scheduler = Scheduler(config.scheduling)
        executor = Executor(scheduler, self._compute_failed)
        await stack.enter_async_context(executor)
        report(f"Looking at {config.source.model}")
        model = await executor.call(self._plan_model)
        report("Joining the swarm")
        node = SwarmNode(config.network, engine=self._engine, clock=self._clock)
        await stack.enter_async_context(node)
        await self._become_reachable(node, model)
        announcer = await self._join(stack, node, model)
        context = ServerContext(
            config=config,
            model=model,
            scheduler=scheduler,
            executor=executor,
            node=node,
            announcer=announcer,
            raise_if_stopped=self._raise_if_stopped,
            on_loading=self._watchers.on_loading,
        )
        blocks: BlockSpan | None = announcer.record.block_spans[0]
        while blocks is not None:
            blocks = await self._serve_span(context, blocks)

    async def _serve_span(self, context: ServerContext, blocks: BlockSpan) -> BlockSpan | None:
        """Serve ``blocks`` until the server leaves them; returns the blocks it moves to, if any."""
        report = self._watchers.on_stage
        report(f"Loading blocks {blocks} of {len(context.model.costs)}")
        async with ServedSpan(context, blocks) as served:
            self.info = await self._online_info(context, served)
            self._online.set()
            report(f"Online: blocks {blocks} ({served.mode})")
            self._watchers.on_online(self.info)
            moves_to = await self._wait_to_leave(context, served)
            num_sessions, seconds = len(served.service.sessions), self.config.drain_seconds
            report("Draining" if moves_to is None else f"Moving to blocks {moves_to}")
            if num_sessions:
                report(f"{plural(num_sessions, 'session')} may stay for up to {seconds:g} s")
            await served.drain(self._at_once, moves_to)
            if self._stop.is_set() or moves_to is None:
                return None
            self._online.clear()
        await context.executor.call(release_memory)
        spans = ((moves_to.start, moves_to.end),)
        await context.announcer.announce(state=ServerState.JOINING, spans=spans, next_spans=())
        return moves_to

    async def _wait_to_leave(self, context: ServerContext, served: ServedSpan) -> BlockSpan | None:
        """Return at ``stop``, or with the blocks to move to."""
        if self.config.blocks is not None or not self.config.moving.enabled:
            await self._stop.wait()
            return None
        model, moving = context.model, self.config.moving
        mover = Mover(context.node, model.id, len(model.costs), moving, self._clock)
        moves_to = await run_until(self._stop, mover.next_blocks(served))
        return None if self._stop.is_set() else moves_to

    def _compute_failed(self) -> None:
        # Nothing can be computed any more, so sessions cannot be migrated either: leave at once. A
        # start that is under way fails by itself at its next call of the executor.
        if self._online.is_set():
            self._at_once.set()
            self.stop()

    def _plan_model(self) -> ModelPlan:
        source, compute = self.config.source, self.config.compute
        torch.set_num_threads(throughput.choose_threads(compute.num_threads))
        access = HubAccess(revision=source.revision, token=source.token, cache_dir=source.cache_dir)
        checkpoint = open_checkpoint(source.model, access)
        # Measuring takes seconds: what the config alone can refuse comes first.
        if self.config.blocks is not None:
            text_config = checkpoint.config.get_text_config(decoder=True)
            check_blocks(source.model, self.config.blocks, text_config.num_hidden_layers)
        device = throughput.find_device(compute.device)
        check_weights(checkpoint, device=device)
        stored = cost.compute_dtype(checkpoint.config, None)
        precision = throughput.choose_precision(compute, stored, device, constants.cache_dir())
        check_quant(checkpoint, precision.quant, device=device)
        held = config_in_memory(checkpoint, device)
        costs = cost.block_costs(held, dtype=precision.dtype, quant=precision.quant)
        name = source.name or checkpoint.model_id
        return ModelPlan(checkpoint, name, precision, device, costs)

    async def _become_reachable(self, node: SwarmNode, model: ModelPlan) -> None:
        view = await node.directory.view(model.id, len(model.costs))
        members = [PeerId(r.peer_id) for r in view.records.values() if not r.relayed]
        if await node.become_reachable(members):
            self._watchers.on_stage("Others cannot dial this server: it is reached through relays")

    async def _join(self, stack: AsyncExitStack, node: SwarmNode, model: ModelPlan) -> Announcer:
        """Choose blocks and announce that this server is going to serve them."""
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
            # Servers that start at the same time see the same gap and would all fill it.
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
        coverage = placement.coverage_of(view, without)
        return placement.choose_blocks(coverage, capacity.num_blocks)

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

    def _raise_if_stopped(self) -> None:
        """Called repeatedly on the compute thread while blocks load: ends a start at ``stop``."""
        if self._stop.is_set():
            raise SessionClosed("The start was interrupted.", hint="Start the server again.")

    async def _online_info(self, context: ServerContext, served: ServedSpan) -> OnlineInfo:
        offer = served.offer
        return OnlineInfo(
            peer_id=context.node.peer_id,
            model=offer.model,
            blocks=offer.blocks,
            addresses=await context.node.addresses(),
            dtype=offer.dtype,
            quant=str(context.model.precision.quant),
            max_length=offer.max_length,
            cache_tokens=served.pool.tokens_total,
        )


def run_until_signalled(server_of: Callable[[], Server]) -> None:
    """Run a server in an event loop of its own until SIGTERM or SIGINT; a second signal ends it
    without waiting for its sessions.

    ``server_of`` makes the server inside the loop. Raises what ``Server.run`` raises.
    """

    async def main() -> None:
        server = server_of()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, server.stop)
        await server.run()

    asyncio.run(main())
