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
from petals.models import cost
from petals.models.adapters import Adapter
from petals.models.kv_layout import KVLayout
from petals.models.orientation import orient_linears
from petals.models.quantize import QuantKind
from petals.models.self_test import SelfTest, gradient_test, run_self_test
from petals.models.sources import Checkpoint, HubAccess, open_checkpoint
from petals.models.span import Span
from petals.models.split import LoadOptions, load_blocks
from petals.server import memory, placement, throughput
from petals.server.announcer import Announcer
from petals.server.config import ServerConfig
from petals.server.executor import Executor
from petals.server.graphs import Allowance
from petals.server.handler import BLOCKS_SERVICE, BlocksService
from petals.server.intake import Offer
from petals.server.kv_pages import KVPool
from petals.server.links import RING_SERVICE
from petals.server.outbox import Outboxes
from petals.server.preload import read_preloaded
from petals.server.scheduler import Scheduler
from petals.server.throughput import Precision, Speed
from petals.server.walk import Place
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import Engine
from petals.swarm.node import SwarmNode
from petals.swarm.records import ServerRecord
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from petals.wire.frames import PROTOCOL_VERSION
from petals.wire.tensors import DTYPES

logger = get_logger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""A step is handed between loop and compute thread at least twice; 5 ms each would show."""

MAX_LENGTH = 8192
"""Longest session of a model that does not say how many positions it knows."""


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
    another thread; ``on_online`` is called in the event loop.
    """

    on_stage: Callable[[str], None] = lambda text: None
    on_loading: Callable[[int, int], None] = lambda done, total: None
    on_online: Callable[[OnlineInfo], None] = lambda info: None


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of the model before its weights are read."""

    checkpoint: Checkpoint
    id: ModelId
    precision: Precision
    device: str
    costs: tuple[cost.BlockCost, ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Blocks that have passed their test, how fast they are, and what may be added to them.

    why_no_gradients: empty if they have passed that test, too.
    """

    span: Span
    test: SelfTest
    speed: Speed
    why_no_gradients: str
    adapters: dict[str, Adapter]


class Server:
    """Serves some blocks of a model, once: ``run`` it until ``stop`` is called, or use it as an
    async context manager, inside of which it is online. ``info`` then says who and what it is.
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
        """Leave: finish the steps under way, tell clients and directory. May be called twice."""
        if self._stop.is_set():
            return
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
        announcer = await self._join(stack, node, model)
        blocks = announcer.record.block_spans[0]
        say(f"Loading blocks {blocks} of {len(model.costs)}")
        loaded = await executor.call(lambda: self._load(model, blocks))
        scheduler.expect(loaded.speed.batch_cost())
        executor.attach(self._make_place(loaded.span))
        pool = self._make_pool(model, loaded.span.layout)
        offer = self._make_offer(model, blocks, loaded, pool)
        outboxes = self._make_outboxes(offer, pool)
        service = BlocksService(offer, executor, pool, outboxes, node, config.door)
        for name, adapter in loaded.adapters.items():
            service.adapters.preload(name, adapter)
        await stack.enter_async_context(service)
        node.serve(BLOCKS_SERVICE, service.serve)
        node.serve(RING_SERVICE, service.ring.serve)
        service.state = ServerState.ONLINE
        await announcer.announce(**self._measured(loaded, offer, pool))
        self.info = await self._online_info(node, model, offer, pool)
        self._online.set()
        say(f"Online: blocks {blocks} ({loaded.test.mode})")
        self._watchers.on_online(self.info)
        background = await stack.enter_async_context(BackgroundTasks())
        background.start(_warn_if_unreachable(node), "asking whether others reach us")
        await self._stop.wait()
        say("Leaving")
        service.state = ServerState.DRAINING
        await announcer.say_goodbye(ServerState.DRAINING)
        await service.finish_steps(config.drain_seconds)

    def _look_at_model(self) -> _Model:
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
        return _Model(checkpoint, name, precision, device, costs)

    async def _join(self, stack: AsyncExitStack, node: SwarmNode, model: _Model) -> Announcer:
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
            view = await node.directory.view(model.id, len(model.costs))
            if placement.must_yield(view, blocks, node.peer_id):
                again = await self._choose_blocks(node, model, (node.peer_id,))
                await announcer.announce(spans=((again.start, again.end),))
        return announcer

    async def _choose_blocks(
        self, node: SwarmNode, model: _Model, without: Sequence[PeerId]
    ) -> BlockSpan:
        budget = self.config.memory
        capacity = memory.plan_capacity(
            model.costs,
            memory.free_memory_bytes(model.device),
            num_blocks=self.config.num_blocks,
            cache_tokens=budget.cache_tokens,
        )
        view = await node.directory.view(model.id, len(model.costs))
        served = placement.throughput_by_block(view, without)
        return placement.choose_span(served, capacity.num_blocks)

    def _first_record(self, node: SwarmNode, model: _Model, blocks: BlockSpan) -> ServerRecord:
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

    def _load(self, model: _Model, blocks: BlockSpan) -> _Loaded:
        options = LoadOptions(
            dtype=model.precision.dtype,
            device=model.device,
            quant=model.precision.quant,
            progress=self._on_loading,
        )
        loaded = load_blocks(model.checkpoint, blocks, options)
        orient_linears(loaded.layers)
        self._go_on()
        span = Span(loaded)
        test = run_self_test(span)
        self._go_on()
        training = self.config.limits.allow_training
        why_no_gradients = gradient_test(span) if training else ""
        self._go_on()
        adapters = read_preloaded(self.config.source.adapters, model.checkpoint, span)
        return _Loaded(span, test, throughput.measure(span), why_no_gradients, adapters)

    def _on_loading(self, done: int, total: int) -> None:
        self._go_on()
        self._watchers.on_loading(done, total)

    def _go_on(self) -> None:
        """Called now and then on the compute thread, so that a start can be broken off."""
        if self._stop.is_set():
            raise SessionClosed("The start was broken off.", hint="Start the server again.")

    def _make_place(self, span: Span) -> Place:
        wanted = self.config.memory.training_bytes
        if wanted is None:
            free = memory.free_memory_bytes(str(span.device))
            wanted = min(free // 4, memory.DEFAULT_TRAINING_BYTES)
        return Place(span, span.device, span.dtype, Allowance(wanted))

    def _make_pool(self, model: _Model, layout: KVLayout) -> KVPool:
        budget = self.config.memory
        if budget.cache_bytes is not None:
            return KVPool(layout, budget.cache_bytes)
        if budget.cache_tokens is not None:
            return KVPool.for_tokens(layout, budget.cache_tokens)
        wanted = KVPool.for_tokens(layout, memory.DEFAULT_CACHE_TOKENS)
        free = memory.free_memory_bytes(model.device) - memory.RESERVE_BYTES
        return wanted if wanted.budget_bytes <= free else KVPool(layout, max(free, 1))

    def _make_offer(self, model: _Model, blocks: BlockSpan, loaded: _Loaded, pool: KVPool) -> Offer:
        limits = self.config.limits
        known = _positions(model.checkpoint) or MAX_LENGTH
        if loaded.span.max_positions is not None:
            known = min(known, loaded.span.max_positions)
        return Offer(
            model=model.id,
            blocks=blocks,
            hidden_size=loaded.span.hidden_size,
            dtype=str(loaded.span.dtype).removeprefix("torch."),
            max_length=limits.max_length or min(known, max(1, pool.tokens_total)),
            max_step_tokens=limits.max_step_tokens,
            max_rows=limits.max_rows,
            slots=loaded.span.slots,
            no_training=self._why_no_training(loaded),
        )

    def _why_no_training(self, loaded: _Loaded) -> str:
        if not self.config.limits.allow_training:
            return "its operator does not allow training"
        return loaded.why_no_gradients

    def _make_outboxes(self, offer: Offer, pool: KVPool) -> Outboxes:
        wanted = self.config.memory.outbox_bytes
        if wanted is None:
            wanted = pool.tokens_total * offer.hidden_size * DTYPES[offer.dtype].itemsize
            wanted = min(wanted, memory.free_memory_bytes("cpu") // 4)
        return Outboxes(wanted)

    def _measured(self, loaded: _Loaded, offer: Offer, pool: KVPool) -> dict[str, object]:
        num_blocks = len(offer.blocks)
        single = loaded.speed.blocks_per_second(num_blocks)
        bulk = loaded.speed.bulk_blocks_per_second(num_blocks)
        told = self.config.announce.throughput
        return {
            "state": ServerState.ONLINE,
            "throughput": bulk if told is None else told,
            "inference_rps": single if told is None else told,
            "forward_rps": bulk if told is None else told,
            "max_length": offer.max_length,
            "cache_tokens": pool.tokens_total,
            "adapters": tuple(loaded.adapters),
            "trains": not offer.no_training,
        }

    async def _online_info(
        self, node: SwarmNode, model: _Model, offer: Offer, pool: KVPool
    ) -> OnlineInfo:
        return OnlineInfo(
            peer_id=node.peer_id,
            model=offer.model,
            blocks=offer.blocks,
            addresses=await node.addresses(),
            dtype=offer.dtype,
            quant=str(model.precision.quant),
            max_length=offer.max_length,
            cache_tokens=pool.tokens_total,
        )


def run_until_signalled(server_of: Callable[[], Server]) -> None:
    """Run a server in an event loop of its own until SIGTERM or SIGINT ends it cleanly.

    ``server_of`` makes the server inside the loop. Raises what ``Server.run`` raises.
    """

    async def main() -> None:
        server = server_of()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, server.stop)
        await server.run()

    asyncio.run(main())


async def _warn_if_unreachable(node: SwarmNode) -> None:
    found = await node.check_reachability()
    if found.reached is False:
        logger.warning("Other peers cannot reach this server. %s", found.advice)


def _positions(checkpoint: Checkpoint) -> int | None:
    """Positions the model was made for, if its config says so."""
    text = checkpoint.config.get_text_config(decoder=True)
    known = getattr(text, "max_position_embeddings", None)
    return int(known) if isinstance(known, int) and known > 0 else None
