"""Which reply answers which request: all three fields of the header, and the hop that has them.

Also where a route is cut into segments.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec
import pytest
import torch

from petals.client.config import ClientConfig
from petals.client.routing.latency import StepTimeouts
from petals.client.session.fill import ReplayBuffer
from petals.client.session.hop import HopReply, HopSession
from petals.client.session.pipeline import PendingReply, SessionContext, expect, run_pieces
from petals.client.session.state import SessionState, StepPiece
from petals.client.session.types import SessionSpec
from petals.errors import PeerUnreachable
from petals.models.runtime.token_log import RowSlices, TokenLog
from petals.testing.manual_clock import ManualClock, settle
from petals.types import BlockSpan, Hop, PeerId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.replies import (
    ForwardFailed,
    Info,
    ReplayDone,
    SessionEnded,
    SessionOpened,
    StepResult,
)
from petals.wire.requests import CloseSession, GetInfo, OpenSession, ReplayPart, Step

INFO = Info("toy", (0, 1), "online", 4, "float32", 9, 8, 99, 0, 0, 0.0)


class FakeChannel:
    """A stream to a server that grants a session and then says what the test says."""

    is_relayed = is_closed = False

    def __init__(self) -> None:
        self.steps: list[int] = []
        """Request ids of the steps that were sent."""
        self._arrived: asyncio.Queue[tuple[Message, list[torch.Tensor]]] = asyncio.Queue()

    async def send(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        match message:
            case GetInfo():
                await self.say(INFO)
            case OpenSession():
                await self.say(SessionOpened(message.header, 9, 60.0))
            case CloseSession():
                await self.say(SessionEnded(message.header))
            case Step():
                self.steps.append(message.header.request_id)

    async def say(self, message: Message, *tensors: torch.Tensor) -> None:
        await self._arrived.put((message, list(tensors)))
        await settle()

    async def receive(self) -> tuple[Message, list[torch.Tensor]]:
        return await self._arrived.get()

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Server:
    """One hop of a session, and the end of its stream that the server has."""

    hop: HopSession
    say: Callable[..., Awaitable[None]]
    steps: list[int]

    def header(self, request_id: int) -> RequestHeader:
        return self.hop.header(request_id)


@pytest.fixture
def channels() -> list[FakeChannel]:
    """The streams that were opened, in their order."""
    return []


@pytest.fixture
async def servers(channels: list[FakeChannel]) -> AsyncIterator[list[Server]]:
    async def open_channel(*args: object) -> FakeChannel:
        channels.append(FakeChannel())
        return channels[-1]

    node = SimpleNamespace(open_channel=open_channel, clock=ManualClock())
    swarm = SimpleNamespace(node=node, config=ClientConfig(), connect_seconds=lambda peer: 1.0)
    spec = SessionSpec(model="toy", num_rows=1, hidden_size=4, max_length=9, epoch=3)
    hops = [
        await HopSession.open(
            swarm, Hop(PeerId(name), BlockSpan(0, 1)), spec, (), None, lambda *args: None
        )
        for name in "ABC"
    ]
    yield [Server(hop, channel.say, channel.steps) for hop, channel in zip(hops, channels)]
    await asyncio.gather(*(hop.close() for hop in hops))


def hops_of(servers: list[Server]) -> list[HopSession]:
    return [server.hop for server in servers]


async def is_done(task: "asyncio.Task[HopReply | None]") -> bool:
    await settle()
    return task.done()


def result(header: RequestHeader) -> StepResult:
    return StepResult(header, 0.0, 0.0, 1)


async def waiting(pending: PendingReply, seconds: float = 10.0) -> "asyncio.Task[HopReply | None]":
    """A request that is sent, and waits."""
    sent = asyncio.Event()

    async def send() -> None:
        sent.set()

    task = asyncio.create_task(pending.receive(seconds, send))
    await sent.wait()
    return task


async def test_any_hop_may_answer_and_the_first_answer_counts(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        task = await waiting(pending)
        for server in (servers[2], servers[0]):
            await server.say(result(server.header(7)))
        reply = await task
    assert reply is not None and reply.hop is servers[2].hop


@pytest.mark.parametrize(
    "changes",
    [{"session_id": b"x" * 16}, {"epoch": 2}, {"epoch": 4}, {"request_id": 6}, {"request_id": 8}],
    ids=str,
)
async def test_all_fields_of_the_header_count(
    servers: list[Server], changes: dict[str, object]
) -> None:
    with expect(hops_of(servers), 7) as pending:
        task = await waiting(pending)
        other = msgspec.structs.replace(servers[1].header(7), **changes)
        for message in (result(other), ReplayDone(other), Refusal("busy", "no", header=other)):
            await servers[1].say(message)
        assert not await is_done(task)
        task.cancel()


async def test_a_hop_cannot_answer_for_another(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        task = await waiting(pending)
        await servers[0].say(result(servers[1].header(7)))
        assert not await is_done(task)
        task.cancel()


async def test_an_answer_after_the_request_is_dropped(servers: list[Server]) -> None:
    answer = result(servers[0].header(7))
    with expect(hops_of(servers), 7):
        pass
    await servers[0].say(answer)
    with expect(hops_of(servers), 8) as pending:
        task = await waiting(pending)
        await servers[0].say(answer)
        assert not await is_done(task)
        task.cancel()


async def test_a_hop_behind_the_request_does_not_count(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        pending.hops = hops_of(servers[1:])
        task = await waiting(pending)
        await servers[0].say(result(servers[0].header(7)))
        assert not await is_done(task)
        task.cancel()


async def test_a_loss_answers_all_requests_of_the_hop(servers: list[Server]) -> None:
    error = PeerUnreachable("gone")
    with expect(hops_of(servers), 7) as first, expect(hops_of(servers[:1]), 8) as second:
        tasks = [await waiting(first), await waiting(second)]
        servers[2].hop.lose(error)
        reply = await tasks[0]
        assert reply is not None and reply.message is error
        assert not await is_done(tasks[1])
        tasks[1].cancel()


async def test_a_hop_reports_a_loss_once(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        for is_first in (True, False):
            task = await waiting(pending)
            await servers[0].say(ForwardFailed(servers[0].header(7)))
            assert await is_done(task) is is_first
        await servers[2].say(ForwardFailed(servers[2].header(7)))  # it forwards to no hop
        assert not await is_done(task)
        task.cancel()


async def test_a_request_ends_after_its_time_even_while_it_is_sent(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        assert await pending.receive(0.0, asyncio.Event().wait) is None


async def test_progress_shortens_the_wait(servers: list[Server]) -> None:
    with expect(hops_of(servers), 7) as pending:
        pending.limit(0.0)  # nothing waits yet
        task = await waiting(pending, 100.0)
        pending.limit(0.0)
        assert await task is None
        pending.limit(0.0)  # it is over already


def part(header: RequestHeader, index: int, start: int, count: int, **more: object) -> ReplayPart:
    return ReplayPart(header, index, 5, (start,), (count,), **more)


async def test_a_replay_to_the_client_is_put_together(servers: list[Server]) -> None:
    say, header = servers[0].say, servers[0].header(7)
    buffer = ReplayBuffer(6, 4, torch.float32, (2,))
    with expect(hops_of(servers[:1]), 7, buffer.add) as pending:
        task = await waiting(pending)
        await say(part(header, 0, 2, 3, reorder=(0,)), torch.ones(3, 4))
        assert not await is_done(task)
        runs = ((1, 6), (1, 7), (1, 8))
        await say(part(header, 1, 5, 3, ends=True, rope_runs=runs), torch.ones(3, 4))
        reply = await task
    assert reply is not None and isinstance(reply.message, ReplayPart)
    assert buffer.rows is not None
    assert (buffer.rows.starts, buffer.rows.counts) == ((2,), (6,))
    assert buffer.rows.rope_lengths == (5, 5, 5, 6, 7, 8)


WRONG = {
    "a part that came before": ((0, 0, 2), [torch.ones(2, 4)]),
    "a part is missing": ((2, 2, 2), [torch.ones(2, 4)]),
    "a gap": ((1, 3, 2), [torch.ones(2, 4)]),
    "more than was asked for": ((1, 2, 5), [torch.ones(5, 4)]),
    "another width": ((1, 2, 2), [torch.ones(2, 3)]),
    "another type": ((1, 2, 2), [torch.ones(2, 4).half()]),
    "not finite": ((1, 2, 2), [torch.full((2, 4), torch.inf)]),
    "nothing": ((1, 2, 2), []),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_replay_that_cannot_be_right_is_misbehaviour(
    case: tuple[tuple[int, int, int], list[torch.Tensor]],
) -> None:
    (numbers, tensors), header = case, RequestHeader(b"0" * 16, 3, 7)
    buffer = ReplayBuffer(6, 4, torch.float32)
    assert not buffer.add(part(header, 0, 0, 2, reorder=(0,)), [torch.ones(2, 4)])
    assert buffer.add(part(header, *numbers), tensors) and buffer.wrong


@pytest.mark.parametrize("runs", [((1, 9),), ((3, 9),), ((1, 2), (1, 9)), ((2, 3),)])
def test_rope_lengths_that_cannot_be_right_are_misbehaviour(
    runs: tuple[tuple[int, int], ...],
) -> None:
    buffer = ReplayBuffer(6, 4, torch.float32, (2,))
    message = part(RequestHeader(b"0" * 16, 3, 7), 0, 2, 2, reorder=(0,), rope_runs=runs)
    assert buffer.add(message, [torch.ones(2, 4)]) and buffer.wrong


async def test_pieces_reach_every_hop_in_their_order(servers: list[Server]) -> None:
    first, second, _ = servers
    state = SessionState(BlockSpan(0, 2), TokenLog(1), legs=[first.hop, second.hop])
    swarm = SimpleNamespace(
        config=ClientConfig(use_server_to_server=False),
        closed_links={},
        node=SimpleNamespace(clock=ManualClock()),
    )
    timeouts = StepTimeouts(swarm.config.failover, 60.0)
    context = SessionContext(state, swarm, first.hop.spec, timeouts, lambda *args: None)
    pieces = [
        StepPiece(n, RowSlices((n,), (1,), torch.full((1, 4), float(n)), (n + 1,)))
        for n in range(3)
    ]
    running = asyncio.create_task(run_pieces(context, pieces))
    await settle()
    assert first.steps == [0, 1, 2]
    for number in (2, 1, 0):  # no server answers like this, but a step that is repeated may
        assert second.steps == []
        await first.say(result(first.header(number)), torch.ones(1, 4))
    await settle()
    assert second.steps == [0, 1, 2]
    for number in range(3):
        await second.say(result(second.header(number)), torch.full((1, 4), 10.0 + number))
    assert await running
    assert [piece.output[0, 0].item() for piece in pieces] == [10.0, 11.0, 12.0]


async def test_a_stream_opened_anew_counts_once_it_has_brought_a_reply(
    servers: list[Server], channels: list[FakeChannel]
) -> None:
    hop = servers[0].hop
    assert hop.is_attached
    hop.lose(PeerUnreachable("The stream broke."))
    await hop.redial()
    assert not hop.state.is_lost and not hop.is_attached
    await channels[-1].say(result(hop.header(1)), torch.ones(1, 4))
    assert hop.is_attached


A, B, C, D = (SimpleNamespace(peer_id=PeerId(name), is_attached=True) for name in "ABCD")


class TestSegments:
    """Where a route is cut."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def context(self, clock: ManualClock) -> SessionContext:
        swarm = SimpleNamespace(
            config=ClientConfig(), closed_links={}, node=SimpleNamespace(clock=clock)
        )
        return SessionContext(None, swarm, None, None, lambda *args: None)

    def segments(self, context: SessionContext, *route: SimpleNamespace) -> list[str]:
        found, at = [], 0
        while at < len(route):
            end = context.segment_end(route, at)
            found.append("".join(hop.peer_id for hop in route[at:end]))
            at = end
        return found

    def test_everything_is_direct_until_it_fails(self, context: SessionContext) -> None:
        assert self.segments(context, A, B, C, D) == ["ABCD"]

    def test_a_closed_link_cuts_one_way_only(self, context: SessionContext) -> None:
        context.close_links([B, C])
        assert self.segments(context, A, B, C, D) == ["AB", "CD"]
        assert self.segments(context, A, C, B, D) == ["ACBD"]

    async def test_a_closed_link_is_tried_again(
        self, context: SessionContext, clock: ManualClock
    ) -> None:
        context.close_links([A, B])
        seconds = context.config.failover.link_retry_seconds
        await clock.advance(seconds - 0.1)
        assert self.segments(context, A, B) == ["A", "B"]
        await clock.advance(0.1)
        assert self.segments(context, A, B) == ["AB"]

    def test_a_stream_opened_anew_brings_the_states_until_it_has_brought_a_reply(
        self, context: SessionContext
    ) -> None:
        far = SimpleNamespace(peer_id=PeerId("E"), is_attached=False)
        assert self.segments(context, A, far, C) == ["A", "EC"]
        far.is_attached = True
        assert self.segments(context, A, far, C) == ["AEC"]

    def test_a_server_does_not_forward_to_itself(self, context: SessionContext) -> None:
        assert self.segments(context, A, A, B) == ["A", "AB"]

    def test_without_direct_links_every_hop_is_a_segment(self, context: SessionContext) -> None:
        context.swarm.config = ClientConfig(use_server_to_server=False)
        assert self.segments(context, A, B, C) == ["A", "B", "C"]
