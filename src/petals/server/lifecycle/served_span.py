"""One stay at a span: load its blocks, serve them, leave them.

A server that moves has several stays, one after the other, on the same device and under the same
peer id. Knows the order of things in a stay; knows nothing of why a span was chosen.
"""

import asyncio
import gc
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import torch

from petals.logs import get_logger
from petals.models.adapters.low_rank import Adapter
from petals.models.checkpoint.sources import Checkpoint
from petals.models.loading import cost
from petals.models.loading.split import LoadOptions, load_blocks
from petals.models.loading.weight_layout import orient_linears
from petals.models.runtime.kv_layout import KVLayout
from petals.models.runtime.span import Span
from petals.models.runtime.token_log import LogBudget
from petals.models.verify.self_test import SelfTest, gradient_test, run_self_test
from petals.server.admission.offer import ServedModel
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.compute.device import DeviceContext
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import KVPool
from petals.server.compute.scheduler import Scheduler
from petals.server.config import ServerConfig
from petals.server.lifecycle import memory, throughput
from petals.server.lifecycle.announcer import Announcer
from petals.server.lifecycle.preloaded_adapters import read_preloaded
from petals.server.lifecycle.throughput import Precision, Speed
from petals.server.network.handler import BlocksService
from petals.server.session.memory import SessionMemory
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, ModelId, ServerState
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from petals.wire.tensors import DTYPES

logger = get_logger(__name__)

MAX_LENGTH = 8192
"""Longest session of a model that does not say how many positions it knows."""

_FINISH_SECONDS = 5.0
"""So long steps under way may take when the time to leave has come."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What is known of the model before its weights are read."""

    checkpoint: Checkpoint
    id: ModelId
    precision: Precision
    device: str
    costs: tuple[cost.BlockCost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    """What all stays of a server share.

    ``go_on`` is called now and then on the compute thread while blocks are loaded; it raises to
    break that off. ``on_loading`` gets (bytes read, bytes to read) there.
    """

    config: ServerConfig
    model: ModelPlan
    scheduler: Scheduler
    executor: Executor
    node: SwarmNode
    announcer: Announcer
    go_on: Callable[[], None]
    on_loading: Callable[[int, int], None]


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


class ServedSpan:
    """Blocks that are served: an async context manager; inside, the directory says ONLINE.

    Entering raises what loading and the self-test raise. ``mode`` is the self-test's finding.
    """

    service: BlocksService
    offer: ServedModel
    pool: KVPool
    mode: str

    def __init__(self, site: ServerContext, blocks: BlockSpan) -> None:
        self.blocks = blocks
        self._site = site
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "ServedSpan":
        try:
            await self._come()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def leave(self, at_once: asyncio.Event, moves_to: BlockSpan | None = None) -> None:
        """Say DRAINING, let clients hand their sessions over, finish what is under way.

        Takes ``drain_seconds`` and a little more at most; ``at_once`` cuts it short.
        """
        await self.say(ServerState.DRAINING, moves_to)
        draining = asyncio.create_task(self.service.sessions.drain(self._site.config.drain_seconds))
        hurry = asyncio.create_task(at_once.wait())
        try:
            await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (draining, hurry):
                task.cancel()
            await asyncio.wait({draining, hurry})
        await self.service.sessions.finish(_FINISH_SECONDS)

    async def say(self, state: ServerState, moves_to: BlockSpan | None = None) -> None:
        """Be ONLINE or DRAINING, for whoever asks and for the directory."""
        self.service.state = state
        await self._site.announcer.say(state, moves_to)

    async def _come(self) -> None:
        site = self._site
        node, executor = site.node, site.executor
        loaded = await executor.call(self._load)
        self._stack.push_async_callback(executor.call, executor.detach)
        site.scheduler.expect(loaded.speed.batch_cost())
        executor.attach(self._make_place(loaded.span))
        self.mode = str(loaded.test.mode)
        self.pool = self._make_pool(loaded.span.layout)
        self.offer = self._make_offer(loaded)
        memory_ = SessionMemory(self.pool, self._make_logs())
        limits, failover = site.config.door, site.config.failover
        self.service = BlocksService(self.offer, executor, memory_, node, limits, failover)
        for name, adapter in loaded.adapters.items():
            self.service.adapters.preload(name, adapter)
        await self._stack.enter_async_context(self.service)
        node.serve(BLOCKS_SERVICE, self.service.serve)
        node.serve(RING_SERVICE, self.service.serve_forwarded)
        self.service.state = ServerState.ONLINE
        await site.announcer.announce(**self._measured(loaded))

    def _load(self) -> _Loaded:
        model = self._site.model
        options = LoadOptions(
            dtype=model.precision.dtype,
            device=model.device,
            quant=model.precision.quant,
            progress=self._on_loading,
        )
        loaded = load_blocks(model.checkpoint, self.blocks, options)
        orient_linears(loaded.layers)
        self._site.go_on()
        span = Span(loaded)
        test = run_self_test(span)
        self._site.go_on()
        training = self._site.config.limits.allow_training
        why_no_gradients = gradient_test(span) if training else ""
        self._site.go_on()
        adapters = read_preloaded(self._site.config.source.adapters, model.checkpoint, span)
        return _Loaded(span, test, throughput.measure(span), why_no_gradients, adapters)

    def _on_loading(self, done: int, total: int) -> None:
        self._site.go_on()
        self._site.on_loading(done, total)

    def _make_place(self, span: Span) -> DeviceContext:
        wanted = self._site.config.memory.training_bytes
        if wanted is None:
            free = memory.free_memory_bytes(str(span.device))
            wanted = min(free // 4, memory.DEFAULT_TRAINING_BYTES)
        return DeviceContext(span, span.device, span.dtype, ActivationBudget(wanted))

    def _make_pool(self, layout: KVLayout) -> KVPool:
        budget = self._site.config.memory
        if budget.cache_bytes is not None:
            return KVPool(layout, budget.cache_bytes)
        if budget.cache_tokens is not None:
            return KVPool.for_tokens(layout, budget.cache_tokens)
        wanted = KVPool.for_tokens(layout, memory.DEFAULT_CACHE_TOKENS)
        free = memory.free_memory_bytes(self._site.model.device) - memory.RESERVE_BYTES
        return wanted if wanted.budget_bytes <= free else KVPool(layout, max(free, 1))

    def _make_offer(self, loaded: _Loaded) -> ServedModel:
        model, limits = self._site.model, self._site.config.limits
        known = _positions(model.checkpoint) or MAX_LENGTH
        if loaded.span.max_positions is not None:
            known = min(known, loaded.span.max_positions)
        return ServedModel(
            model=model.id,
            blocks=self.blocks,
            hidden_size=loaded.span.hidden_size,
            dtype=str(loaded.span.dtype).removeprefix("torch."),
            max_length=limits.max_length or min(known, max(1, self.pool.tokens_total)),
            max_step_tokens=limits.max_step_tokens,
            max_rows=limits.max_rows,
            slots=loaded.span.slots,
            no_training=self._why_no_training(loaded),
            kv_format=kv_format(model.precision, loaded.span.layout),
        )

    def _why_no_training(self, loaded: _Loaded) -> str:
        if not self._site.config.limits.allow_training:
            return "its operator does not allow training"
        return loaded.why_no_gradients

    def _make_logs(self) -> LogBudget:
        wanted = self._site.config.memory.outbox_bytes
        if wanted is None:
            itemsize = DTYPES[self.offer.dtype].itemsize
            wanted = self.pool.tokens_total * self.offer.hidden_size * itemsize
            wanted = min(wanted, memory.free_memory_bytes("cpu") // 4)
        return LogBudget(wanted)

    def _measured(self, loaded: _Loaded) -> dict[str, object]:
        num_blocks = len(self.blocks)
        single = loaded.speed.blocks_per_second(num_blocks)
        bulk = loaded.speed.bulk_blocks_per_second(num_blocks)
        told = self._site.config.announce.throughput
        return {
            "state": ServerState.ONLINE,
            "throughput": bulk if told is None else told,
            "inference_rps": single if told is None else told,
            "forward_rps": bulk if told is None else told,
            "max_length": self.offer.max_length,
            "cache_tokens": self.pool.tokens_total,
            "adapters": tuple(loaded.adapters),
            "trains": not self.offer.no_training,
        }


def kv_format(precision: Precision, layout: KVLayout) -> str:
    """What two servers of a block have in common if one can go on with the other's pages."""
    if layout.page_dtype is None:
        return ""
    return f"{precision.dtype} {precision.quant}, keeps {layout.page_dtype}".replace("torch.", "")


def release_memory() -> None:
    """Give back what a stay that is over has used, so that the next finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _positions(checkpoint: Checkpoint) -> int | None:
    """Positions the model was made for, if its config says so."""
    text = checkpoint.config.get_text_config(decoder=True)
    known = getattr(text, "max_position_embeddings", None)
    return int(known) if isinstance(known, int) and known > 0 else None
