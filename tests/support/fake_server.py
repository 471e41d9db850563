"""Servers of blocks that need no model: each block mixes a token with the mean of all before it.

What a position yields depends on the whole row before it, so a row that was not rolled back, not
reordered or cut in the wrong place gives other numbers. Faults are switched on by the test.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import pytest
import torch
import torch.distributed.tensor  # noqa: F401  assert_close imports it late and stops a loop
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.client.training.hop_call import PassCall
from petals.errors import (
    BatchTooLarge,
    BlocksNotServed,
    CacheFull,
    PassExpired,
    PetalsError,
    SessionGap,
    UnknownAdapter,
)
from petals.swarm.config import NodeConfig
from petals.swarm.directory.records import ServerRecord
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.testing.memory_net import MemoryNet
from petals.types import BlockSpan, PeerId, ServerState
from petals.wire import replies, requests
from petals.wire.handshake import Refusal
from petals.wire.passes import (
    AdapterKept,
    Backward,
    BackwardResult,
    Forward,
    ForwardResult,
    PutAdapter,
)
from support.clients import config

HIDDEN = 6
MODEL = "toy"
PATH = "mix"

# Its first call imports for seconds: in the middle of a test, peers would take that for a death.
torch.testing.assert_close(torch.ones(1), torch.ones(1))


def run_block(block: int, row: Tensor) -> Tensor:
    """[T, H] -> [T, H]."""
    counts = torch.arange(1, len(row) + 1).unsqueeze(1)
    return 0.5 * row + 0.1 * (block + 1) * row.cumsum(0) / counts


def expected(row: Tensor, blocks: BlockSpan) -> Tensor:
    """A whole row through blocks on this machine."""
    for block in range(blocks.start, blocks.end):
        row = run_block(block, row)
    return row


def run_call(hidden: Tensor, blocks: BlockSpan, call: PassCall) -> dict[int, Tensor]:
    """Packed rows through blocks with a call's prompts and adapters: what each block puts out."""
    outputs: dict[int, list[Tensor]] = {block: [] for block in range(blocks.start, blocks.end)}
    for number, row in enumerate(torch.split(hidden, list(call.counts))):
        for block in outputs:
            if call.prompts is not None:
                prompts = call.prompts[block - blocks.start].expand(len(call.counts), -1, -1)
                prompt = prompts[number, : len(row)]
                row = torch.cat([row[: len(prompt)] + prompt, row[len(prompt) :]])
            if call.adapter is not None and (block, PATH) in call.adapter.parts:
                at = 2 * list(call.adapter.parts).index((block, PATH))
                a, b = call.adapter.tensors[at : at + 2]
                scaling = call.adapter.parts[block, PATH].scaling
                row = run_block(block, row) + scaling * (row @ a.T) @ b.T
            else:
                row = run_block(block, row)
            outputs[block].append(row)
    return {block: torch.cat(rows) for block, rows in outputs.items()}


@dataclass
class ToyPart:
    rank: int
    scaling: float


@dataclass
class ToyAdapter:
    """Low-rank matrices beside whole toy blocks."""

    parts: dict[tuple[int, str], ToyPart]
    tensors: tuple[Tensor, ...]

    @classmethod
    def random(cls, blocks: Sequence[int], rank: int = 2, seed: int = 0) -> "ToyAdapter":
        draw = torch.Generator().manual_seed(seed)
        tensors = []
        for _ in blocks:
            tensors += [
                torch.randn(*shape, generator=draw).requires_grad_()
                for shape in ((rank, HIDDEN), (HIDDEN, rank))
            ]
        return cls({(block, PATH): ToyPart(rank, 0.5) for block in blocks}, tuple(tensors))

    @property
    def digest(self) -> str:
        content = repr([tensor.tolist() for tensor in self.tensors])
        return hashlib.sha256((repr(self.parts) + content).encode()).hexdigest()

    def within(self, blocks: BlockSpan) -> "ToyAdapter | None":
        kept = [index for index, (block, _) in enumerate(self.parts) if block in blocks]
        slots = list(self.parts)
        tensors = tuple(self.tensors[2 * index + side] for index in kept for side in (0, 1))
        parts = {slots[index]: self.parts[slots[index]] for index in kept}
        return ToyAdapter(parts, tensors) if parts else None


def states(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@dataclass
class Traced:
    """A pass with its graph: hidden, prompts and matrices; the output and the taps."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    num_given: int


@dataclass(eq=False)
class ToyServer:
    """One server. Its lists say what it was asked; its switches make it misbehave."""

    node: SwarmNode
    blocks: BlockSpan
    max_sessions: int = 100
    max_batch_tokens: int = 0
    max_length: int = 2048
    hidden_size: int = HIDDEN
    """What it says its width is."""
    lease_seconds: float = 60.0
    adapters: tuple[str, ...] = ()
    record_spans: tuple[tuple[int, int], ...] | None = None
    answer: str = "right"
    compute_seconds: float = 0.002
    """What it says a step took."""
    refuse_steps: list[PetalsError] = field(default_factory=list)
    max_pass_tokens: int = 1 << 20
    refuse_opens: list[PetalsError] = field(default_factory=list)
    held: asyncio.Event | None = None
    is_reading: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, the server takes no messages and answers pings all the same."""
    channels: list[Channel] = field(default_factory=list)
    sessions: dict[bytes, list[Tensor]] = field(default_factory=dict)
    calls: dict[bytes, PassCall] = field(default_factory=dict)
    """What each session was opened with."""
    steps: list[requests.Step] = field(default_factory=list)
    replays: list[requests.ReplayPart] = field(default_factory=list)
    tokens_free: int = 10**6
    replay_answer: str = "right"
    opened: list[requests.OpenSession] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    backwards: list[Backward] = field(default_factory=list)
    on_forward: Callable[[], None] = lambda: None
    refuse_backwards: list[PetalsError] = field(default_factory=list)
    trains: bool = True
    has_room: bool = True
    """Whether it keeps passes for their way back."""
    kept: dict[bytes, Traced] = field(default_factory=dict)
    given: dict[str, ToyAdapter] = field(default_factory=dict)
    num_given: int = 0
    num_kept: int = 0
    num_asked: int = 0
    max_under_way: int = 0
    _under_way: int = 0
    _freed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.is_reading.set()

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    async def until(self, happened: Callable[[], bool]) -> None:
        """Return once ``happened()``, looked at after every message."""
        async with asyncio.timeout(5), self._heard:
            await self._heard.wait_for(happened)

    async def until_opened(self, times: int) -> None:
        """Return once ``OpenSession`` has come so often."""
        await self.until(lambda: len(self.opened) >= times)

    async def announce(self, **changes: object) -> None:
        now = self.node.clock.now()
        spans = self.record_spans or ((self.blocks.start, self.blocks.end),)
        values = {"state": ServerState.ONLINE, "adapters": self.adapters, "spans": spans}
        values |= {"trains": self.trains} | changes
        await self.node.directory.announce(
            ServerRecord(peer_id="", model=MODEL, num_blocks=100, expires_at=now + 600, **values)
        )

    async def serve(self, channel: Channel) -> None:
        mine: dict[bytes, BlockSpan] = {}
        tasks: set[asyncio.Task[None]] = set()
        turn = asyncio.Lock()
        self.channels.append(channel)
        try:
            while True:
                await self.is_reading.wait()
                message, tensors = await channel.receive()
                if isinstance(message, requests.Step):
                    self._under_way += 1
                    self.max_under_way = max(self.max_under_way, self._under_way)
                task = asyncio.create_task(self._answer(channel, message, tensors, mine, turn))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, channel, message, tensors, mine, turn) -> None:
        try:
            answer, sent = await self._hear(message, tensors, mine, turn)
        except PetalsError as error:
            answer, sent = Refusal.of(error, getattr(message, "header", None)), ()
        finally:
            if isinstance(message, requests.Step):
                self._under_way -= 1
        if answer is not None:
            await channel.send(answer, sent)

    async def _hear(self, message, tensors, mine, turn):
        match message:
            case requests.GetInfo():
                self.num_asked += 1
                return self._info(), ()
            case requests.OpenSession():
                return await self._open(message, tensors, mine), ()
            case requests.KeepSession():
                self.num_kept += 1
                await self._notify()
                return None, ()
            case requests.CloseSession(header):
                async with self._freed:
                    self.sessions.pop(header.session_id, None)
                    self._freed.notify_all()
                await self._notify()
                return replies.SessionEnded(header), ()
            case requests.BeginEpoch():
                return None, ()
            case requests.ReplayRequest(header):
                return self._replay(message, mine[header.session_id])
            case requests.ReplayPart(header):
                self.replays.append(message)
                self._step(message, tensors[0], mine[header.session_id])
                return (replies.ReplayDone(header) if message.ends else None), ()
            case requests.Step(header):
                self.steps.append(message)
                await self._notify()
                if self.answer == "losses":
                    return replies.ForwardFailed(header), ()
                async with turn:
                    if self.held is not None:
                        await self.held.wait()
                    output = self._step(message, tensors[0], mine[header.session_id])
                result = replies.StepResult(header, 0.001, self.compute_seconds, len(output))
                return result, self._sent(output)
            case Forward():
                return self._forward(message, tensors)
            case Backward():
                return self._backward(message, tensors)
            case PutAdapter():
                self.num_given += 1
                parts = {
                    (part.block, part.module): ToyPart(part.rank, part.scaling)
                    for part in message.parts
                }
                self.given[message.adapter] = ToyAdapter(parts, tuple(tensors))
                return AdapterKept(message.adapter, 60.0), ()

    def _forward(self, message: Forward, tensors: list[Tensor]):
        self.forwards.append(message)
        self.on_forward()
        if self.refuse_steps:
            raise self.refuse_steps.pop(0)
        if sum(message.counts) > self.max_pass_tokens:
            raise BatchTooLarge("A pass of so many tokens is too much.")
        traced = self._trace(message, tensors)
        is_kept = message.pass_id is not None and self.has_room
        if is_kept:
            self.kept[message.pass_id] = traced
        outputs = [self._sent(output.detach()) for output in traced.outputs]
        result = ForwardResult(0.0, 0.0, kept=is_kept, lease_seconds=60.0 * is_kept)
        return result, [tensor for sent in outputs for tensor in sent]

    def _backward(self, message: Backward, tensors: list[Tensor]):
        self.backwards.append(message)
        if self.refuse_backwards:
            raise self.refuse_backwards.pop(0)
        num_grads = 1 + len(message.forward.taps)
        if message.kept:
            if message.forward.pass_id not in self.kept:
                raise PassExpired("Gone.")
            traced = self.kept.pop(message.forward.pass_id)
            assert len(tensors) == num_grads
        else:
            traced = self._trace(message.forward, tensors[num_grads:])
        inputs = traced.inputs if message.wants_adapter else traced.inputs[: traced.num_given]
        grads = torch.autograd.grad(traced.outputs, inputs, tensors[:num_grads])
        sent = [tensor for grad in grads for tensor in self._sent(grad)]
        return BackwardResult(0.0, 0.0, recomputed=not message.kept), sent

    def _trace(self, message: Forward, tensors: list[Tensor]) -> "Traced":
        blocks, given = BlockSpan(*message.blocks), [t.requires_grad_() for t in tensors]
        assert self.blocks.covers(blocks), (self.blocks, blocks)
        prompts = given[1] if message.num_prompt_tokens else None
        assert prompts is None or prompts.shape[2] == message.num_prompt_tokens
        adapter = None
        if message.adapter is not None:
            adapter = self.given.get(message.adapter)
            if adapter is None:
                raise UnknownAdapter("No such adapter.")
            matrices = tuple(t.detach().requires_grad_() for t in adapter.tensors)
            adapter = ToyAdapter(adapter.parts, matrices)
            given = [*given, *matrices]
        made = run_call(tensors[0], blocks, PassCall(message.counts, prompts, adapter))
        outputs = [made[blocks.end - 1], *(made[block] for block in message.taps)]
        return Traced(given, outputs, len(tensors))

    async def _notify(self) -> None:
        async with self._heard:
            self._heard.notify_all()

    def _info(self) -> replies.Info:
        return replies.Info(
            model=MODEL,
            blocks=(self.blocks.start, self.blocks.end),
            state="online",
            hidden_size=self.hidden_size,
            dtype="float32",
            max_length=self.max_length,
            max_batch_tokens=self.max_batch_tokens,
            tokens_free=self.tokens_free,
            num_sessions=len(self.sessions),
            queue_tokens=0,
            step_seconds=0.0,
            outbox_bytes_free=10**9,
        )

    async def _open(self, message: requests.OpenSession, tensors, mine) -> replies.SessionOpened:
        self.opened.append(message)
        await self._notify()
        if self.refuse_opens:
            raise self.refuse_opens.pop(0)
        if not self.blocks.covers(BlockSpan(*message.blocks)):
            raise BlocksNotServed("Not here.")
        if message.adapter is not None and message.adapter not in (*self.adapters, *self.given):
            raise UnknownAdapter("No such adapter.")
        prompts = tensors[0][:, None] if message.num_prompt_tokens else None
        adapter = self.given.get(message.adapter)
        self.calls[message.header.session_id] = PassCall((), prompts, adapter)
        try:
            async with asyncio.timeout(message.alloc_timeout_seconds), self._freed:
                while len(self.sessions) >= self.max_sessions:
                    await self._freed.wait()
                self.sessions[message.header.session_id] = [
                    torch.empty(0, HIDDEN)
                ] * message.num_rows
        except TimeoutError:
            raise CacheFull("Full.") from None
        mine[message.header.session_id] = BlockSpan(*message.blocks)
        granted = message.max_length or self.max_length
        return replies.SessionOpened(message.header, granted, self.lease_seconds)

    def _step(self, message: requests.Step, hidden: Tensor, blocks: BlockSpan) -> Tensor:
        if self.refuse_steps:
            raise self.refuse_steps.pop(0)
        rows = self.sessions[message.header.session_id]
        if message.reorder is not None:
            rows = [rows[old] for old in message.reorder]
        outputs, news = [], torch.split(hidden, list(message.counts))
        for number, (start, new) in enumerate(zip(message.starts, news, strict=True)):
            if start > len(rows[number]):
                raise SessionGap("A gap.")
            rows[number] = torch.cat([rows[number][:start], new])
            outputs.append(self._run_row(message.header.session_id, rows[number], blocks)[start:])
        self.sessions[message.header.session_id] = rows
        return torch.cat(outputs).to(hidden.dtype)

    def _run_row(self, session_id: bytes, row: Tensor, blocks: BlockSpan) -> Tensor:
        call = replace(self.calls[session_id], counts=(len(row),))
        return run_call(row, blocks, call)[blocks.end - 1]

    def _replay(
        self, message: requests.ReplayRequest, blocks: BlockSpan
    ) -> tuple[requests.ReplayPart, tuple[Tensor]]:
        """What it has put out, to the client; toys know no reorder that came between."""
        assert not message.next_hops
        rows = zip(self.sessions[message.header.session_id], message.lengths, strict=True)
        rerun = partial(self._run_row, message.header.session_id, blocks=blocks)
        output = torch.cat([rerun(row[:length]) for row, length in rows])
        step = requests.ReplayPart(
            header=message.header,
            index=0,
            before_step=message.before_step,
            starts=(0,) * len(message.lengths),
            counts=message.lengths,
            reorder=(0,) * len(message.lengths),
            ends=True,
        )
        match self.replay_answer:
            case "gap":
                step = msgspec.structs.replace(step, starts=(1,) * len(message.lengths))
            case "long":
                longer = (message.lengths[0] + 1, *message.lengths[1:])
                step = msgspec.structs.replace(step, counts=longer)
                output = torch.cat([output[:1], output])
            case "narrow":
                output = output[:, :-1]
            case "nan":
                output = output * torch.nan
        return step, (output,)

    def _sent(self, output: Tensor) -> tuple[Tensor, ...]:
        match self.answer:
            case "narrow":
                return (output[:, :-1],)
            case "nan":
                return (output * torch.nan,)
            case "half":
                return (output.half(),)
            case "nothing":
                return ()
        return (output,)


@dataclass
class ToySwarm:
    """Servers and a client on one network in memory."""

    net: MemoryNet
    servers: list[ToyServer]
    client: SwarmNode
    stack: AsyncExitStack

    async def add(self, start: int, end: int, **options: object) -> ToyServer:
        node = await self.stack.enter_async_context(SwarmNode(NodeConfig(), engine=self.net.engine))
        server = ToyServer(node, BlockSpan(start, end), **options)
        node.serve("blocks", server.serve)
        await server.announce()
        self.servers.append(server)
        return server

    def hush_directory(self, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
        """From now on the client's directory never answers; set once it has been asked."""
        asked = asyncio.Event()

        async def never(*_: object) -> None:
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(self.client.directory, "view", never)
        return asked

    def access(self, num_blocks: int, **options: object) -> SwarmConnection:
        """Another client's view on the same node; toys do not know each other."""
        options = {"use_server_to_server": False} | options
        return SwarmConnection(config(**options), MODEL, num_blocks, self.client)

    def server_of(self, session: SessionRows, hop: int) -> ToyServer:
        """The server of a hop."""
        peer = session.trace.hops[hop].peer_id
        return next(server for server in self.servers if server.peer_id == peer)

    async def at_rest(self) -> bool:
        """True once no server holds a session."""
        await asyncio.sleep(0)
        return not any(server.sessions for server in self.servers)


@asynccontextmanager
async def toy_swarm(*spans: Sequence[int], **options: object) -> AsyncIterator[ToySwarm]:
    """A swarm with one server per (start, end)."""
    net = MemoryNet()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            SwarmNode(NodeConfig(client_mode=True), engine=net.engine)
        )
        swarm = ToySwarm(net, [], client, stack)
        for start, end in spans:
            await swarm.add(start, end, **options)
        yield swarm


async def open_one(access: SwarmConnection, blocks: BlockSpan) -> SessionRows:
    """A session of one row, opened by a step of no tokens."""
    session = SessionRows(access, blocks, max_length=20)
    await session.step(torch.empty(0, HIDDEN), (0,), (0,))
    return session
