"""Servers of one tiny model over a network in memory, and a client that sends frames by hand."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch

from petals.clock import Clock
from petals.server.admission.offer import ServedModel
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.compute.device import DeviceContext
from petals.server.compute.executor import Executor
from petals.server.compute.kv_pool import KVPool
from petals.server.compute.scheduler import Scheduler
from petals.server.config import ClientLimits
from petals.server.network.handler import BlocksService
from petals.server.policies import SchedulerConfig
from petals.server.session.output_log import OutputLogBudget
from petals.server.session.session import Session
from petals.swarm.config import MIB, NodeConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.testing.memory_net import MemoryNet
from petals.types import PeerId, ServerState
from petals.wire.header import NextHop
from petals.wire.messages import AnyMessage
from petals.wire.replies import ForwardFailed, ReplayDone, SessionOpened, StepResult
from petals.wire.requests import BeginEpoch, OpenSession, Step
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from support.models import WIDTH, whole_model
from support.service import MODEL, FussySpan

SESSION = b"s" * 16
Blocks = tuple[int, int]


@dataclass
class Worker:
    """A server that holds all blocks of the model; sessions use parts of them."""

    node: SwarmNode
    service: BlocksService
    runner: FussySpan
    pool: KVPool
    outboxes: OutputLogBudget

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    @property
    def num_batches(self) -> int:
        return len(self.runner.batches)

    @property
    def session(self) -> Session:
        (session,) = self.service.sessions
        return session


@dataclass
class Leg:
    """One hop as the client sees it."""

    worker: Worker
    blocks: Blocks
    channel: Channel

    async def hear(self) -> tuple[AnyMessage, list[torch.Tensor]]:
        """The next answer. That a lane broke is left out: here nobody waits for what it took."""
        while True:
            message, tensors = await self.channel.receive(10.0)
            if not isinstance(message, ForwardFailed):
                return message, tensors

    @property
    def next_hop(self) -> NextHop:
        return NextHop(self.worker.peer_id, self.blocks)


@dataclass
class StepForwarder:
    """One session of a client through ``legs``."""

    swarm: "RingOfServers"
    client: SwarmNode
    session_id: bytes = SESSION
    epoch: int = 0
    legs: list[Leg] = field(default_factory=list)

    async def add(self, worker: Worker, blocks: Blocks, rows: int = 1) -> Leg:
        """Open a hop behind those there are; its source is the one before it."""
        source = (self.legs[-1].worker.peer_id,) if self.legs else ()
        leg = await self.open(worker, blocks, rows, source)
        self.legs.append(leg)
        return leg

    async def open(
        self, worker: Worker, blocks: Blocks, rows: int = 1, sources: tuple[str, ...] = ()
    ) -> Leg:
        channel = await self.client.open_channel(worker.peer_id, BLOCKS_SERVICE)
        opening = OpenSession(
            session_id=self.session_id,
            epoch=self.epoch,
            model=MODEL,
            blocks=blocks,
            num_rows=rows,
            max_length=64,
            dtype="float32",
            sources=sources,
        )
        await channel.request(opening, expect=SessionOpened, timeout=10.0)
        return Leg(worker, blocks, channel)

    def message(
        self,
        step_id: int,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: tuple[int, ...] | None = None,
        first: int = 0,
    ) -> Step:
        """A step for leg ``first`` that goes on through all legs behind it."""
        rest = tuple(leg.next_hop for leg in self.legs[first + 1 :])
        return Step(
            self.session_id, self.epoch, step_id, tuple(starts), tuple(counts), reorder, rest
        )

    async def step(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """One step around the ring; hidden[r]: [n_r, H] -> the same shapes."""
        counts = [len(part) for part in hidden]
        message = self.message(step_id, starts, counts, reorder)
        await self.legs[0].channel.send(message, (torch.cat(list(hidden)),))
        return list((await self.result(step_id)).split(counts))

    async def result(self, step_id: int) -> torch.Tensor:
        """What the last hop has put out."""
        answer, tensors = await self.legs[-1].hear()
        assert isinstance(answer, StepResult), answer
        assert (answer.step_id, answer.undelivered) == (step_id, ())
        assert len(answer.timings) == len(self.legs) - 1
        return tensors[0]

    async def announce(self, *legs: Leg) -> None:
        """A new epoch begins: tell ``legs`` who comes before them now."""
        for leg in legs:
            index = self.legs.index(leg)
            sources = (self.legs[index - 1].worker.peer_id,) if index else ()
            await leg.channel.send(BeginEpoch(self.session_id, self.epoch, sources))

    async def replayed(self, leg: Leg) -> None:
        answer, _ = await leg.hear()
        assert answer == ReplayDone(self.session_id, self.epoch), answer


@dataclass
class RingOfServers:
    net: MemoryNet
    workers: list[Worker]
    client: SwarmNode
    stranger: SwarmNode

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the whole model makes of [n, H], without any cache."""
        return self.workers[0].runner.span.reference(hidden)

    async def ring(
        self, *blocks: Blocks, rows: int = 1, session_id: bytes = SESSION
    ) -> StepForwarder:
        """A session through the first workers, one for every range."""
        ring = StepForwarder(self, self.client, session_id)
        for worker, part in zip(self.workers, blocks):
            await ring.add(worker, part, rows)
        return ring


@asynccontextmanager
async def ring_of_servers(
    num_workers: int = 3,
    model: str = "llama",
    *,
    clock: Clock | None = None,
    outbox_bytes: int = MIB,
    scheduling: SchedulerConfig | None = None,
) -> AsyncIterator[RingOfServers]:
    """``num_workers`` servers of blocks 10:14, a client and another member of the swarm."""
    net = MemoryNet(clock)
    async with AsyncExitStack() as stack:

        async def member(*peers: SwarmNode) -> SwarmNode:
            addresses = await peers[0].addresses() if peers else ()
            config = NodeConfig(initial_peers=addresses)
            return await stack.enter_async_context(
                SwarmNode(config, engine=net.engine, clock=clock)
            )

        first = await member()
        workers = []
        for _ in range(num_workers):
            span = whole_model(model)
            runner, pool = FussySpan(span), KVPool.for_tokens(span.layout, 1024)
            offer = ServedModel(
                model=MODEL,
                blocks=span.blocks,
                hidden_size=WIDTH,
                dtype="float32",
                max_length=256,
                max_step_tokens=512,
                max_rows=8,
            )
            node, outboxes = await member(first), OutputLogBudget(outbox_bytes)
            executor = await stack.enter_async_context(
                Executor(Scheduler(scheduling or SchedulerConfig()))
            )
            executor.attach(DeviceContext(runner, span.device, span.dtype, ActivationBudget(MIB)))
            door = ClientLimits(replay_chunk_tokens=5)
            service = BlocksService(offer, executor, pool, outboxes, node, door)
            service.state = ServerState.ONLINE
            node.serve(BLOCKS_SERVICE, service.serve)
            node.serve(RING_SERVICE, service.ring.serve)
            await stack.enter_async_context(service)
            workers.append(Worker(node, service, runner, pool, outboxes))
        yield RingOfServers(net, workers, await member(first), await member(first))
