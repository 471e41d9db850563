"""A tiny model served over a network in memory, and a client that speaks message by message."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch

from petals.clock import Clock
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span
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
from petals.swarm.config import MIB, NodeConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, ModelId, ServerState
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage
from petals.wire.replies import SessionEnded, SessionOpened, StepResult
from petals.wire.requests import CloseSession, OpenSession, Step
from petals.wire.services import BLOCKS_SERVICE
from support.models import WIDTH, whole_model

MODEL = ModelId("tiny")
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


@dataclass
class Served:
    """A server of a whole tiny model and a client's node in the same memory."""

    net: MemoryNet
    span: Span
    reference: Span
    """The same model once more, for us: a span belongs to one thread at a time."""
    runner: FussySpan
    pool: KVPool
    service: BlocksService
    server: SwarmNode
    client: SwarmNode
    clock: Clock
    place: DeviceContext
    _talks: list["Talk"] = field(default_factory=list)

    async def talk(self, client: SwarmNode | None = None) -> "Talk":
        channel = await (client or self.client).open_channel(self.server.peer_id, BLOCKS_SERVICE)
        return Talk(channel, self.span.blocks)

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the whole model makes of [n, H], without any cache."""
        return self.reference.reference(hidden)

    async def at_rest(self) -> None:
        """Every session is gone and every page is back."""
        await self.service.executor.call(lambda: None)
        self.pool.check_integrity()
        assert len(self.service.sessions) == 0
        assert self.pool.reserved_bytes == 0
        assert self.pool.used_bytes == 0
        assert self.place.allowance.used_bytes == len(self.service.passes.kept) == 0


@dataclass
class Talk:
    """One channel to the server, driven by hand."""

    channel: Channel
    blocks: BlockSpan
    session_id: bytes = b"s" * 16

    async def ask(
        self, message: AnyMessage, *tensors: torch.Tensor
    ) -> tuple[AnyMessage, list[torch.Tensor]]:
        await self.channel.send(message, tensors)
        return await self.channel.receive(20.0)

    async def refused(self, message: AnyMessage, *tensors: torch.Tensor) -> Refusal:
        answer, _ = await self.ask(message, *tensors)
        assert isinstance(answer, Refusal), answer
        assert answer.message
        return answer

    def opening(self, rows: int = 1, max_length: int = 64, **changes: object) -> OpenSession:
        fields: dict[str, object] = {
            "session_id": self.session_id,
            "epoch": 0,
            "model": MODEL,
            "blocks": (self.blocks.start, self.blocks.end),
            "num_rows": rows,
            "max_length": max_length,
            "dtype": "float32",
        }
        return OpenSession(**{**fields, **changes})

    async def open(self, rows: int = 1, max_length: int = 64, **changes: object) -> SessionOpened:
        answer, _ = await self.ask(self.opening(rows, max_length, **changes))
        assert isinstance(answer, SessionOpened), answer
        return answer

    async def step(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """One step; hidden[r]: [n_r, H] -> the same shapes."""
        counts = tuple(len(part) for part in hidden)
        message = Step(self.session_id, 0, step_id, tuple(starts), counts, reorder)
        answer, tensors = await self.ask(message, torch.cat(list(hidden)))
        assert isinstance(answer, StepResult), answer
        assert (answer.session_id, answer.step_id) == (self.session_id, step_id)
        return list(tensors[0].split(counts))

    async def close(self) -> None:
        answer, _ = await self.ask(CloseSession(self.session_id))
        assert isinstance(answer, SessionEnded)
        await self.channel.close()


def states(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random hidden states [num_tokens, WIDTH]."""
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-5 of the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@asynccontextmanager
async def served(
    model: str = "llama",
    *,
    num_tokens: int = 1024,
    door: ClientLimits | None = None,
    scheduling: SchedulerConfig | None = None,
    clock: Clock | None = None,
    training_bytes: int = 64 * MIB,
    no_training: str = "",
) -> AsyncIterator[Served]:
    """Serve blocks 10:14 of a tiny model with room for ``num_tokens`` tokens."""
    net = MemoryNet(clock)
    span, reference = whole_model(model), whole_model(model)
    runner = FussySpan(span)
    pool = KVPool.for_tokens(span.layout, num_tokens)
    offer = ServedModel(
        model=MODEL,
        blocks=span.blocks,
        hidden_size=WIDTH,
        dtype="float32",
        max_length=256,
        max_step_tokens=512,
        max_rows=8,
        slots=span.slots,
        no_training=no_training,
    )
    scheduler = Scheduler(scheduling or SchedulerConfig())
    server = SwarmNode(NodeConfig(), engine=net.engine, clock=clock)
    async with server, Executor(scheduler) as executor:
        place = DeviceContext(runner, span.device, span.dtype, ActivationBudget(training_bytes))
        executor.attach(place)
        outboxes = OutputLogBudget(MIB)
        service = BlocksService(offer, executor, pool, outboxes, server, door or ClientLimits())
        service.state = ServerState.ONLINE
        server.serve(BLOCKS_SERVICE, service.serve)
        joined = NodeConfig(initial_peers=await server.addresses())
        async with service, SwarmNode(joined, engine=net.engine, clock=clock) as client:
            yield Served(
                net, span, reference, runner, pool, service, server, client, server.clock, place
            )
