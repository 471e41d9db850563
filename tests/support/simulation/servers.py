"""The servers of a simulation: real services over toy blocks, and the directory that lists them."""

import asyncio
from dataclasses import dataclass, field

from petals.models.runtime.token_log import LogBudget
from petals.server.admission.offer import ServedModel
from petals.server.compute.kv_pool import KVPool
from petals.server.config import ClientLimits
from petals.server.network.handler import BlocksService
from petals.server.session.memory import SessionMemory
from petals.swarm.directory.records import ServerRecord, View
from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan, ModelId, PeerId, ServerState
from petals.wire.services import BLOCKS_SERVICE, RING_SERVICE
from support.simulation.channels import SimNode
from support.simulation.network import SimNetwork
from support.simulation.toy_blocks import WIDTH, InlineExecutor, layout_of

MODEL = ModelId("toy")
LEASE_SECONDS = 6.0
COMPUTE_SECONDS = 0.005
RECORD_SECONDS = 4.0
"""How long the directory lists a server that has died."""

FINISH_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class SimServerOptions:
    """What one server offers. ``rate``: blocks per second in its record; faster ones are chosen."""

    blocks: BlockSpan
    rate: float = 1000.0
    max_step_tokens: int = 64
    num_tokens: int = 4096
    log_bytes: int = 1 << 20
    max_length: int = 256
    kv_format: str = "toy"
    replay_tokens: int = 4


class SimDirectory:
    """Which servers there are; what it says of the dead is old."""

    def __init__(self) -> None:
        self.servers: list[SimServer] = []
        self.num_blocks = 0

    async def view(self, model: ModelId, num_blocks: int) -> View:
        """See ``Directory.view``."""
        now = asyncio.get_running_loop().time()
        records = {
            server.peer_id: server.record(model, num_blocks)
            for server in self.servers
            if server.is_alive or now < server.died_at + RECORD_SECONDS
        }
        return View(model, num_blocks, records, now)


@dataclass(eq=False)
class SimServer:
    """A server that can die and come back; ``start`` it."""

    net: SimNetwork
    directory: SimDirectory
    peer_id: PeerId
    options: SimServerOptions
    failover: FailoverConfig
    is_alive: bool = False
    died_at: float = -1e9
    node: SimNode = field(init=False)
    service: BlocksService = field(init=False)
    executor: InlineExecutor = field(init=False)
    pool: KVPool = field(init=False)
    logs: LogBudget = field(init=False)
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _ending: list["asyncio.Task[None]"] = field(default_factory=list)

    async def start(self) -> None:
        """A new process, which remembers nothing."""
        options, blocks = self.options, self.options.blocks
        self.node = SimNode(self.net, self.peer_id, self.directory)
        self.executor = InlineExecutor(blocks, self.net.clock, COMPUTE_SECONDS)
        layout = layout_of(blocks)
        self.pool = KVPool.for_tokens(layout, options.num_tokens)
        self.logs = LogBudget(options.log_bytes)
        offer = ServedModel(
            model=MODEL,
            blocks=blocks,
            hidden_size=WIDTH,
            dtype="float32",
            max_length=options.max_length,
            max_step_tokens=options.max_step_tokens,
            max_rows=8,
            kv_format=options.kv_format,
        )
        limits = ClientLimits(
            lease_seconds=LEASE_SECONDS, replay_chunk_tokens=options.replay_tokens
        )
        memory = SessionMemory(self.pool, self.logs)
        self.service = BlocksService(offer, self.executor, memory, self.node, limits, self.failover)
        await self.service.__aenter__()
        self.service.state = ServerState.ONLINE
        self.node.serve(BLOCKS_SERVICE, self.service.serve)
        self.node.serve(RING_SERVICE, self.service.serve_forwarded)
        self.is_alive = True

    def record(self, model: ModelId, num_blocks: int) -> ServerRecord:
        """What the directory says of it."""
        span = self.options.blocks
        return ServerRecord(
            peer_id=self.peer_id,
            model=model,
            num_blocks=num_blocks,
            spans=((span.start, span.end),),
            state=self.service.state,
            expires_at=1e12,
            inference_rps=self.options.rate,
        )

    def kill(self, *, silently: bool = False) -> None:
        """The process dies; ``silently``: with its machine, so streams do not end."""
        if self.is_alive:
            self.is_alive, self.died_at = False, self.net.now()
            self.net.vanish(self.peer_id, silently=silently)
            self._ending.append(asyncio.create_task(self._clear_away(self.node, self.service)))

    def drain(self, seconds: float) -> None:
        """Leave as an operator asks for it: sessions may stay for ``seconds``."""
        if self.is_alive and self.service.state is ServerState.ONLINE:
            self.service.state = ServerState.DRAINING
            self._ending.append(asyncio.create_task(self._leave(self.service, seconds)))

    async def revive(self) -> None:
        """Start again, if it has died. One call at a time starts it."""
        async with self._starting:
            if not self.is_alive:
                await self.ended()
                await self.start()

    async def ended(self) -> None:
        """Wait until nothing of earlier processes is left."""
        await asyncio.gather(*self._ending)
        self._ending.clear()

    async def check_integrity(self) -> None:
        """The server's own check of its state, if it lives."""
        if self.is_alive:
            await self.service.check_integrity()

    def check_nothing_held(self) -> None:
        """Raise AssertionError if anything is reserved. Returns at once if the server is dead."""
        if self.is_alive:
            assert len(self.service.sessions) == 0, f"{self.peer_id} still has a session"
            assert self.pool.reserved_bytes == 0, f"{self.peer_id} still holds KV memory"
            assert self.logs.used_bytes == 0, f"{self.peer_id} still keeps outputs"

    async def _leave(self, service: BlocksService, seconds: float) -> None:
        await service.sessions.drain(seconds)
        await service.sessions.finish(FINISH_SECONDS)
        if self.service is service and self.is_alive:
            self.is_alive, self.died_at = False, self.net.now()
            await service.__aexit__(None, None, None)
            self.net.vanish(self.peer_id, silently=False)
            await self._clear_away(self.node, service)

    async def _clear_away(self, node: SimNode, service: BlocksService) -> None:
        """End the tasks of a process that is dead."""
        serving = node.leave()
        if serving:
            await asyncio.wait(serving)
        await service.__aexit__(None, None, None)
        await node.background.close()
