"""Real services of a tiny model over a network in memory, and a client that sends frames by hand.

``served`` is the only builder: one server or several, which may forward to each other. When a scene
ends it checks that the servers' books are right, and that all memory comes back once they stop.
"""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch

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
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from petals.wire.handshake import Refusal
from petals.wire.header import NextHop, RequestHeader
from petals.wire.messages import AnyMessage
from petals.wire.replies import ForwardFailed, SessionEnded, SessionOpened, StepResult
from petals.wire.requests import CloseSession, OpenSession, Step
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from support.models import WIDTH, whole_model

MODEL = ModelId("tiny")
PATIENCE_SECONDS = 20.0
Run = Callable[[Sequence[Segment]], list[torch.Tensor]]
Answer = tuple[AnyMessage, list[torch.Tensor]]


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
    """A server that holds all blocks of the model; sessions use parts of them."""

    node: SwarmNode
    service: BlocksService
    runner: FussySpan
    executor: Executor
    pool: KVPool
    logs: LogBudget
    device: DeviceContext

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    @property
    def num_batches(self) -> int:
        return len(self.runner.batches)

    @property
    def session(self) -> Session:
        """The only session."""
        (session,) = self.service.sessions
        return session

    def find(self, session_id: bytes) -> Session:
        (session,) = (s for s in self.service.sessions if s.key.session_id == session_id)
        return session

    async def check(self) -> None:
        """The server's books are right, as soon as no request is under way."""
        await self.until(lambda: self.service.is_idle)
        assert await self.service.check_integrity()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let things happen until ``holds``."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds():
                await self.executor.call(lambda: None)
                await asyncio.sleep(0)


@dataclass
class Served:
    """Servers, a client's node and another member of the swarm, in the same memory."""

    net: MemoryNet
    reference: Span
    """The same model once more, for us: a span belongs to one thread at a time."""
    workers: list[Worker]
    client: SwarmNode
    stranger: SwarmNode
    clock: Clock
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def service(self) -> BlocksService:
        return self.workers[0].service

    @property
    def server(self) -> SwarmNode:
        return self.workers[0].node

    @property
    def executor(self) -> Executor:
        return self.workers[0].executor

    @property
    def runner(self) -> FussySpan:
        return self.workers[0].runner

    @property
    def pool(self) -> KVPool:
        return self.workers[0].pool

    @property
    def device(self) -> DeviceContext:
        return self.workers[0].device

    @property
    def span(self) -> Span:
        """What the first server runs."""
        return self.runner.span

    async def talk(self, client: SwarmNode | None = None, worker: Worker | None = None) -> "Talk":
        """A channel to a server (the first one), about a session of its own."""
        worker = worker or self.workers[0]
        channel = await (client or self.client).open_channel(worker.peer_id, BLOCKS_SERVICE)
        return Talk(channel, worker.runner.blocks, self.new_id())

    def new_id(self) -> bytes:
        """An id that no session has yet."""
        return next(self._numbers).to_bytes(16, "big")

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the whole model makes of [n, H], without any cache."""
        return self.reference.reference(hidden)

    async def at_rest(self) -> None:
        """Every session is gone and every page is back."""
        for worker in self.workers:
            await worker.check()
            assert len(worker.service.sessions) == 0
            assert worker.pool.reserved_bytes == worker.pool.used_bytes == 0
            assert worker.logs.used_bytes == worker.device.activation_budget.used_bytes == 0


@dataclass
class Talk:
    """One channel to a server, and one session that it is about, driven by hand."""

    channel: Channel
    blocks: BlockSpan
    session_id: bytes = b"s" * 16
    epoch: int = 0

    @property
    def next_hop(self) -> NextHop:
        return NextHop(self.channel.peer_id, self.session_id)

    def header(self, request_id: int = 0, epoch: int | None = None) -> RequestHeader:
        return RequestHeader(self.session_id, self.epoch if epoch is None else epoch, request_id)

    async def ask(self, message: AnyMessage, *tensors: torch.Tensor) -> Answer:
        await self.channel.send(message, tensors)
        return await self.hear()

    async def hear(self) -> Answer:
        """The next answer. That a link broke is left out: here nobody waits for what it took."""
        while True:
            message, tensors = await self.channel.receive(PATIENCE_SECONDS)
            if not isinstance(message, ForwardFailed):
                return message, tensors

    async def refused(self, message: AnyMessage, *tensors: torch.Tensor) -> Refusal:
        """The refusal, which has the header of the message, if that has one."""
        answer, _ = await self.ask(message, *tensors)
        assert isinstance(answer, Refusal), answer
        assert answer.message
        assert answer.header == getattr(message, "header", None)
        return answer

    def opening(self, rows: int = 1, max_length: int = 64, **changes: object) -> OpenSession:
        fields: dict[str, object] = {
            "header": self.header(),
            "model": MODEL,
            "blocks": (self.blocks.start, self.blocks.end),
            "num_rows": rows,
            "max_length": max_length,
            "dtype": "float32",
        }
        return OpenSession(**{**fields, **changes})

    async def open(self, rows: int = 1, max_length: int = 64, **changes: object) -> SessionOpened:
        opening = self.opening(rows, max_length, **changes)
        answer, _ = await self.ask(opening)
        assert isinstance(answer, SessionOpened), answer
        assert answer.header == opening.header
        return answer

    def message(
        self,
        step_id: int,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: tuple[int, ...] | None = None,
        next_hops: tuple[NextHop, ...] = (),
    ) -> Step:
        header = self.header(step_id)
        return Step(header, tuple(starts), tuple(counts), reorder, next_hops)

    async def step(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """One step; hidden[r]: [n_r, H] -> the same shapes."""
        counts = tuple(len(part) for part in hidden)
        message = self.message(step_id, starts, counts, reorder)
        answer, tensors = await self.ask(message, torch.cat(list(hidden)))
        assert isinstance(answer, StepResult), answer
        assert answer.header == message.header
        return list(tensors[0].split(counts))

    async def close(self) -> None:
        answer, _ = await self.ask(CloseSession(self.header()))
        assert isinstance(answer, SessionEnded)
        await self.channel.close()


def hold_compute(swarm: Served) -> Callable[[], None]:
    """Keep the first server's compute thread busy until the returned function is called."""
    free = threading.Event()
    swarm.executor.post(free.wait)
    return free.set


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How the servers of a scene are set up."""

    model: str = "llama"
    num_tokens: int = 1024
    door: ClientLimits = ClientLimits()
    failover: FailoverConfig = FailoverConfig()
    scheduling: SchedulerConfig = SchedulerConfig()
    training_bytes: int = 64 * MIB
    log_bytes: int = MIB
    no_training: str = ""


async def _worker(stack: AsyncExitStack, node: SwarmNode, options: WorkerOptions) -> Worker:
    span = whole_model(options.model)
    runner, pool = FussySpan(span), KVPool.for_tokens(span.layout, options.num_tokens)
    offer = ServedModel(
        model=MODEL,
        blocks=span.blocks,
        hidden_size=WIDTH,
        dtype="float32",
        max_length=256,
        max_step_tokens=512,
        max_rows=8,
        slots=span.slots,
        no_training=options.no_training,
    )
    executor = await stack.enter_async_context(Executor(Scheduler(options.scheduling)))
    budget = ActivationBudget(options.training_bytes)
    device = DeviceContext(runner, span.device, span.dtype, budget)
    logs = LogBudget(options.log_bytes)
    memory = SessionMemory(pool, logs, is_checked=True)
    executor.attach(device, memory.check_when_idle)
    service = BlocksService(offer, executor, memory, node, options.door, options.failover)
    service.state = ServerState.ONLINE
    node.serve(BLOCKS_SERVICE, service.serve)
    node.serve(RING_SERVICE, service.serve_forwarded)
    return Worker(node, service, runner, executor, pool, logs, device)


@asynccontextmanager
async def served(
    model: str = "llama", *, num_servers: int = 1, clock: Clock | None = None, **options: object
) -> AsyncIterator[Served]:
    """Serve blocks 10:14 of a tiny model by ``num_servers`` servers; see WorkerOptions."""
    net, settings = MemoryNet(clock), WorkerOptions(model=model, **options)
    async with AsyncExitStack() as stack:

        async def member(*peers: SwarmNode) -> SwarmNode:
            addresses = await peers[0].addresses() if peers else ()
            config = NodeConfig(initial_peers=addresses)
            node = SwarmNode(config, engine=net.engine, clock=clock)
            return await stack.enter_async_context(node)

        first = await member()
        workers = []
        for number in range(num_servers):
            node = await member(first) if number else first
            workers.append(await _worker(stack, node, settings))
        client, stranger = await member(first), await member(first)
        async with AsyncExitStack() as services:
            for worker in workers:
                await services.enter_async_context(worker.service)
            yield Served(net, whole_model(model), workers, client, stranger, first.clock)
            for worker in workers:
                await worker.check()
        for worker in workers:
            await worker.executor.call(worker.pool.check_integrity)
            assert worker.pool.reserved_bytes == worker.logs.used_bytes == 0
