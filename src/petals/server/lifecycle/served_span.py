"""The life of one span on a server: load its blocks, serve them, drain, unload.

A server that moves serves several spans one after the other, on the same device and under the same
peer id. Knows the order of the steps; does not know why a span was chosen.
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
from petals.models.loading.weight_layout import choose_weight_layouts
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
from petals.swarm.background import run_until
from petals.swarm.node import SwarmNode
from petals.types import BlockSpan, ModelId, ServerState
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from petals.wire.tensors import DTYPES

logger = get_logger(__name__)

MAX_LENGTH = 8192
"""Longest session (tokens per row) of a model whose config does not limit positions."""

_FINISH_SECONDS = 5.0
"""Longest wait for running steps after draining has ended."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Facts about the model that are known before its weights are read."""

    checkpoint: Checkpoint
    id: ModelId
    precision: Precision
    device: str
    costs: tuple[cost.BlockCost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    """What all served spans of a server share.

    ``raise_if_stopped`` is called repeatedly on the compute thread while blocks load; it raises to
    interrupt that. ``on_loading`` gets (bytes read, bytes to read) there.
    """

    config: ServerConfig
    model: ModelPlan
    scheduler: Scheduler
    executor: Executor
    node: SwarmNode
    announcer: Announcer
    raise_if_stopped: Callable[[], None]
    on_loading: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Blocks that have passed the self-test, their speed, and the preloaded adapters.

    why_no_gradients: why the test of gradients failed or was not made; empty if it passed.
    """

    span: Span
    test: SelfTest
    speed: Speed
    why_no_gradients: str
    adapters: dict[str, Adapter]


class ServedSpan:
    """Serves ``blocks`` while it is entered (an async context manager); the directory says ONLINE.

    Entering raises what loading and the self-test raise. ``mode``: how the blocks run several rows,
    as the self-test has found.
    """

    service: BlocksService
    offer: ServedModel
    pool: KVPool
    mode: str

    def __init__(self, context: ServerContext, blocks: BlockSpan) -> None:
        self.blocks = blocks
        self._context = context
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "ServedSpan":
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def drain(self, at_once: asyncio.Event, moves_to: BlockSpan | None = None) -> None:
        """Announce DRAINING, let clients migrate their sessions, finish running steps.

        Takes at most ``drain_seconds`` + 5 s (running steps) + 2 s (announcement); ``at_once`` ends
        the wait for sessions.
        """
        await self.announce_state(ServerState.DRAINING, moves_to)
        await run_until(at_once, self.service.sessions.drain(self._context.config.drain_seconds))
        await self.service.sessions.finish(_FINISH_SECONDS)

    async def announce_state(self, state: ServerState, moves_to: BlockSpan | None = None) -> None:
        """Be ONLINE or DRAINING, for clients that ask and in the directory."""
        self.service.state = state
        await self._context.announcer.announce_state(state, moves_to)

    async def _start(self) -> None:
        context = self._context
        config, node, executor = context.config, context.node, context.executor
        loaded = await executor.call(self._load)
        self._stack.push_async_callback(executor.call, executor.detach)
        context.scheduler.expect(loaded.speed.batch_cost())
        self.mode = str(loaded.test.mode)
        self.pool = self._make_pool(loaded.span.layout)
        self.offer = self._make_offer(loaded)
        is_checked = config.memory.check_integrity
        memory_ = SessionMemory(self.pool, self._make_logs(), is_checked)
        check = memory_.check_when_idle if is_checked else None
        executor.attach(self._device_context(loaded.span), check)
        self.service = BlocksService(
            self.offer, executor, memory_, node, config.clients, config.failover
        )
        for name, adapter in loaded.adapters.items():
            self.service.adapters.preload(name, adapter)
        await self._stack.enter_async_context(self.service)
        node.serve(BLOCKS_SERVICE, self.service.serve)
        node.serve(RING_SERVICE, self.service.serve_forwarded)
        self.service.state = ServerState.ONLINE
        await context.announcer.announce(**self._measured(loaded))

    def _load(self) -> _Loaded:
        context = self._context
        model, config = context.model, context.config
        options = LoadOptions(
            dtype=model.precision.dtype,
            device=model.device,
            quant=model.precision.quant,
            progress=self._on_loading,
        )
        loaded = load_blocks(model.checkpoint, self.blocks, options)
        choose_weight_layouts(loaded.layers)
        context.raise_if_stopped()
        span = Span(loaded)
        test = run_self_test(span)
        context.raise_if_stopped()
        why_no_gradients = "its operator does not allow training"
        if config.limits.allow_training:
            why_no_gradients = gradient_test(span)
        context.raise_if_stopped()
        adapters = read_preloaded(config.source.adapters, model.checkpoint, span)
        return _Loaded(span, test, throughput.measure(span), why_no_gradients, adapters)

    def _on_loading(self, done: int, total: int) -> None:
        self._context.raise_if_stopped()
        self._context.on_loading(done, total)

    def _device_context(self, span: Span) -> DeviceContext:
        wanted = self._context.config.memory.training_bytes
        if wanted is None:
            free = memory.free_memory_bytes(str(span.device))
            wanted = min(free // 4, memory.DEFAULT_TRAINING_BYTES)
        return DeviceContext(span, span.device, span.dtype, ActivationBudget(wanted))

    def _make_pool(self, layout: KVLayout) -> KVPool:
        budget = self._context.config.memory
        if budget.cache_bytes is not None:
            return KVPool(layout, budget.cache_bytes)
        if budget.cache_tokens is not None:
            return KVPool.for_tokens(layout, budget.cache_tokens)
        wanted = KVPool.for_tokens(layout, memory.DEFAULT_CACHE_TOKENS)
        free = memory.free_memory_bytes(self._context.model.device) - memory.RESERVE_BYTES
        return wanted if wanted.budget_bytes <= free else KVPool(layout, max(free, 1))

    def _make_offer(self, loaded: _Loaded) -> ServedModel:
        model, limits = self._context.model, self._context.config.limits
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
            no_training=loaded.why_no_gradients,
            kv_format=kv_format(model.precision, loaded.span.layout),
            arithmetic=arithmetic(model.precision, model.device),
        )

    def _make_logs(self) -> LogBudget:
        wanted = self._context.config.memory.outbox_bytes
        if wanted is None:
            itemsize = DTYPES[self.offer.dtype].itemsize
            wanted = self.pool.tokens_total * self.offer.hidden_size * itemsize
            wanted = min(wanted, memory.free_memory_bytes("cpu") // 4)
        return LogBudget(wanted)

    def _measured(self, loaded: _Loaded) -> dict[str, object]:
        num_blocks = len(self.blocks)
        single = loaded.speed.blocks_per_second(num_blocks)
        bulk = loaded.speed.bulk_blocks_per_second(num_blocks)
        given = self._context.config.announce.throughput
        return {
            "state": ServerState.ONLINE,
            "throughput": bulk if given is None else given,
            "inference_rps": single if given is None else given,
            "max_length": self.offer.max_length,
            "cache_tokens": self.pool.tokens_total,
            "adapters": tuple(loaded.adapters),
            "trains": not self.offer.no_training,
        }


def kv_format(precision: Precision, layout: KVLayout) -> str:
    """A name of what the blocks compute in and keep; empty if their KV cannot be transferred.

    Servers of one block with equal names can continue from each other's KV.
    """
    if layout.kv_dtype is None:
        return ""
    return f"{precision.dtype} {precision.quant}, keeps {layout.kv_dtype}".replace("torch.", "")


def arithmetic(precision: Precision, device: str) -> str:
    """What decides how the sums of the blocks are rounded: precision, processor, threads.

    Servers with equal names give the same bits for the same batch.
    """
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        kernels, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        processor = f"CPU {kernels}, {threads} thread{'s' * (threads > 1)}"
    return f"{precision.dtype} {precision.quant}, {processor}".replace("torch.", "")


def release_memory() -> None:
    """Return the memory of a span that was unloaded to the device, for the next span."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _positions(checkpoint: Checkpoint) -> int | None:
    """Number of positions that the model was made for, if its config says so."""
    text = checkpoint.config.get_text_config(decoder=True)
    known = getattr(text, "max_position_embeddings", None)
    return int(known) if isinstance(known, int) and known > 0 else None
