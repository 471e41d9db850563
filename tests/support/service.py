"""Real services of a tiny model over a network in memory, and clients that use them.

``served`` gives every server the whole model, ``split`` a part to each; both build on ``running``.
When a scene ends, sessions and connections are closed, the servers' books are checked, and all
memory has to come back once they stop.
"""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.training.hop_call import PassCall
from petals.clock import Clock
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span
from petals.models.runtime.token_log import LogBudget
from petals.server.admission.offer import ServedModel
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.compute.device import DeviceContext
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import KVPool
from petals.server.compute.scheduler import Scheduler
from petals.server.config import ClientLimits
from petals.server.network.handler import BlocksService
from petals.server.policies import SchedulerConfig
from petals.server.session.memory import SessionMemory
from petals.server.session.session import Session
from petals.swarm.config import MIB, NodeConfig
from petals.swarm.directory.records import ServerRecord
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, PeerId, ServerState
from petals.wire.fields import Message
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from support.clients import config
from support.models import BLOCKS, WIDTH, part_of_model
from support.reference import assert_close
from support.server_faults import Faults
from support.talk import MODEL, Talk

PATIENCE_SECONDS = 20.0
Run = Callable[[Sequence[Segment]], list[torch.Tensor]]


class FussySpan:
    """A span that breaks on states holding ``poison`` and counts the batches it has run."""

    poison = 1e9

    def __init__(self, span: Span) -> None:
        self.span = span
        self.batches: list[int] = []
        self.blocks, self.mode, self.weights = span.blocks, span.mode, span.weights

    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        return self._run(segments, self.span.run)

    def trace(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        return self._run(segments, self.span.trace)

    def _run(self, segments: Sequence[Segment], how: Run) -> list[torch.Tensor]:
        self.batches.append(len(segments))
        outputs = how(segments)
        if any(bool((segment.hidden == self.poison).any()) for segment in segments):
            raise RuntimeError("the kernel does not like these numbers")
        return outputs


@dataclass(eq=False)
class Worker:
    """One server: the real service, with ``faults`` between it and its clients."""

    node: SwarmNode
    service: BlocksService
    runner: FussySpan
    executor: Executor
    pool: KVPool
    logs: LogBudget
    device: DeviceContext
    faults: Faults
    is_training: bool
    _held: list[threading.Event] = field(default_factory=list)

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    @property
    def blocks(self) -> BlockSpan:
        return self.runner.blocks

    @property
    def num_batches(self) -> int:
        return len(self.runner.batches)

    @property
    def session(self) -> Session:
        """The only session."""
        (session,) = self.service.sessions
        return session

    async def announce(self, **changes: object) -> None:
        """Write a record into the directory; ``changes`` are to its fields."""
        fields: dict[str, object] = {
            "num_blocks": 100,
            "spans": ((self.blocks.start, self.blocks.end),),
            "state": self.service.state,
            "expires_at": self.node.clock.now() + 600,
            "trains": self.is_training,
        }
        record = ServerRecord(peer_id="", model=MODEL, **{**fields, **changes})
        await self.node.directory.announce(record)

    async def check(self) -> None:
        """The server's books are right, as soon as no request is under way."""
        is_checked = False
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_checked:  # a request may come before the compute thread has counted
                await self.until(lambda: self.service.is_idle)
                is_checked = await self.service.check_integrity()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let things happen until ``holds``."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds():
                await self.executor.call(lambda: None)
                await asyncio.sleep(0)

    async def at_rest(self) -> None:
        """Every session is gone and every page is back."""
        await self.until(lambda: not len(self.service.sessions))
        await self.check()
        assert self.pool.reserved_bytes == self.pool.used_bytes == 0
        assert self.logs.used_bytes == self.device.activation_budget.used_bytes == 0

    def hold(self) -> Callable[[], None]:
        """Keep the compute thread busy until the returned function is called."""
        free = threading.Event()
        self._held.append(free)
        self.executor.post(free.wait)
        return free.set

    def release(self) -> None:
        """End all that ``hold`` has begun."""
        for free in self._held:
            free.set()


@dataclass(kw_only=True)
class Served:
    """Servers, a client's node and another member of the swarm, in the same memory."""

    model: str
    whole: BlockSpan
    net: MemoryNet
    client: SwarmNode
    stranger: SwarmNode
    clock: Clock | None
    stack: AsyncExitStack
    workers: list[Worker] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @cached_property
    def reference(self) -> Span:
        """The same model once more, for us: a span belongs to one thread at a time."""
        return part_of_model(self.model, self.whole, self.whole)

    @property
    def service(self) -> BlocksService:
        return self.workers[0].service

    @property
    def executor(self) -> Executor:
        return self.workers[0].executor

    @property
    def runner(self) -> FussySpan:
        return self.workers[0].runner

    @property
    def pool(self) -> KVPool:
        return self.workers[0].pool

    async def join(self) -> SwarmNode:
        """One more peer."""
        node = SwarmNode(NodeConfig(), engine=self.net.engine, clock=self.clock)
        return await self.stack.enter_async_context(node)

    async def add(self, start: int, end: int, **options: Any) -> Worker:
        """Start a server and announce it; ``options`` are those of WorkerOptions."""
        span = part_of_model(self.model, BlockSpan(start, end), self.whole)
        server = running(await self.join(), span, WorkerOptions(**options))
        worker = await self.stack.enter_async_context(server)
        self.workers.append(worker)
        await worker.announce()
        return worker

    async def talk(self, client: SwarmNode | None = None, worker: Worker | None = None) -> Talk:
        """A channel to a server (the first one), about a session of its own."""
        worker = worker or self.workers[0]
        channel = await (client or self.client).open_channel(worker.peer_id, BLOCKS_SERVICE)
        return Talk(channel, worker.blocks, self.new_id())

    def new_id(self) -> bytes:
        """An id that no session has yet."""
        return next(self._numbers).to_bytes(16, "big")

    def expected(self, hidden: torch.Tensor, blocks: BlockSpan | None = None) -> torch.Tensor:
        """What the model (or ``blocks`` of it) makes of [n, H], without any cache."""
        return self.reference.reference(hidden, blocks)

    def traced(
        self, hidden: torch.Tensor, call: PassCall, blocks: BlockSpan | None = None
    ) -> dict[int, torch.Tensor]:
        """The output [n, H] of each block for packed rows; gradients flow to all inputs."""
        blocks = blocks or self.whole
        adapter = None if call.adapter is None else call.adapter.within(blocks)
        prompts = call.prompts
        if prompts is not None:
            prompts = prompts.expand(-1, len(call.counts), -1, -1)
        segments = [
            Segment(
                hidden=row,
                blocks=blocks,
                adapter=adapter,
                prompts=None if prompts is None else prompts[:, number],
            )
            for number, row in enumerate(hidden.split(list(call.counts)))
        ]
        outputs = self.reference.trace(segments)[-len(blocks) :]
        return dict(zip(range(blocks.start, blocks.end), (output[0] for output in outputs)))

    def connection(self, **options: Any) -> SwarmConnection:
        """A client's view of the swarm, closed with it. Its states do not go from server to server
        unless ``options`` (ClientConfig's, FailoverConfig's) say so.
        """
        settings = config(**({"use_server_to_server": False} | options))
        connection = SwarmConnection(settings, MODEL, self.whole.end, self.client)
        self.stack.push_async_callback(connection.close)
        return connection

    def session(
        self,
        connection: SwarmConnection | None = None,
        *,
        blocks: BlockSpan | None = None,
        max_length: int | None = 20,
        tuning: Tuning | None = None,
        **options: Any,
    ) -> SessionRows:
        """A session that is closed with the swarm; over all blocks unless ``blocks`` are given."""
        session = SessionRows(
            connection or self.connection(**options),
            blocks or self.whole,
            max_length=max_length,
            tuning=tuning,
        )
        self.stack.push_async_callback(session.close)
        return session

    def server_of(self, session: SessionRows, hop: int) -> Worker:
        """The server of a hop."""
        peer = session.trace.hops[hop].peer_id
        return next(worker for worker in self.workers if worker.peer_id == peer)

    def num_asked(self, kind: type[Message]) -> list[int]:
        """Messages of one type that each server has got from clients."""
        return [len(worker.faults.all(kind)) for worker in self.workers]

    async def banned(self, connection: SwarmConnection) -> frozenset[PeerId]:
        """The servers that a client avoids now."""
        return frozenset((await connection.view()).bans.at(self.client.clock.monotonic()))

    async def decode(self, session: SessionRows, text: torch.Tensor, start: int) -> None:
        """The tokens of ``text`` from ``start`` on, one in each step, come out right."""
        wanted = self.expected(text, session.blocks)
        for at in range(start, len(text)):
            output = await session.step(text[at : at + 1], (at,), (1,))
            assert_close(output, wanted[at : at + 1])

    def silence_directory(self) -> asyncio.Event:
        """From now on the client's directory never answers; set once it has been asked."""
        asked = asyncio.Event()

        async def never(*_: object) -> None:
            asked.set()
            await asyncio.Event().wait()

        self.client.directory.view = never  # type: ignore[method-assign, assignment]
        return asked

    async def at_rest(self) -> None:
        """Every session is gone and every page is back, at every server."""
        for worker in self.workers:
            await worker.at_rest()


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How a server is set up."""

    num_tokens: int = 1024
    max_length: int = 256
    max_step_tokens: int = 512
    max_rows: int = 8
    hidden_size: int = WIDTH
    """What the server says its width is."""
    door: ClientLimits = ClientLimits()
    failover: FailoverConfig = FailoverConfig()
    scheduling: SchedulerConfig = SchedulerConfig()
    training_bytes: int = 64 * MIB
    log_bytes: int = MIB
    no_training: str = ""


@asynccontextmanager
async def running(node: SwarmNode, span: Span, options: WorkerOptions) -> AsyncIterator[Worker]:
    """The server of one node. Its books are right, and its memory has come back, when it ends."""
    runner, pool = FussySpan(span), KVPool.for_tokens(span.layout, options.num_tokens)
    offer = ServedModel(
        model=MODEL,
        blocks=span.blocks,
        hidden_size=options.hidden_size,
        dtype="float32",
        max_length=options.max_length,
        max_step_tokens=options.max_step_tokens,
        max_rows=options.max_rows,
        slots=span.slots,
        no_training=options.no_training,
    )
    budget = ActivationBudget(options.training_bytes)
    device = DeviceContext(runner, span.device, span.dtype, budget)
    logs = LogBudget(options.log_bytes)
    memory = SessionMemory(pool, logs, is_checked=True)
    async with Executor(Scheduler(options.scheduling)) as executor:
        executor.attach(device, memory.check_when_idle)
        service = BlocksService(offer, executor, memory, node, options.door, options.failover)
        service.state = ServerState.ONLINE
        faults = Faults()
        node.serve(BLOCKS_SERVICE, faults.before(service.serve))
        node.serve(RING_SERVICE, service.serve_forwarded)
        async with service:
            trains = not options.no_training
            worker = Worker(node, service, runner, executor, pool, logs, device, faults, trains)
            try:
                yield worker
            finally:
                worker.release()
            await worker.check()
        await executor.call(pool.check_integrity)
        assert pool.reserved_bytes == logs.used_bytes == 0


@asynccontextmanager
async def served(
    model: str = "llama",
    *,
    num_servers: int = 1,
    whole: BlockSpan = BLOCKS,
    clock: Clock | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """A tiny model whose blocks are ``whole``, all of them on each of ``num_servers`` servers;
    ``options`` are those of WorkerOptions.
    """
    net = MemoryNet(clock)
    async with AsyncExitStack() as stack:
        client, stranger = [
            await stack.enter_async_context(SwarmNode(NodeConfig(), engine=net.engine, clock=clock))
            for _ in range(2)
        ]
        swarm = Served(
            model=model,
            whole=whole,
            net=net,
            client=client,
            stranger=stranger,
            clock=clock,
            stack=stack,
        )
        for _ in range(num_servers):
            await swarm.add(whole.start, whole.end, **options)
        yield swarm


@asynccontextmanager
async def split(
    *spans: tuple[int, int], num_blocks: int = 6, **options: Any
) -> AsyncIterator[Served]:
    """A model of the blocks 0..num_blocks-1, and a server for each of ``spans``."""
    async with served(num_servers=0, whole=BlockSpan(0, num_blocks)) as swarm:
        for start, end in spans:
            await swarm.add(start, end, **options)
        yield swarm
