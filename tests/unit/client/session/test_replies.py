"""Which reply answers which request: all three fields of the header, and the hop that has them."""

import asyncio
from dataclasses import dataclass

import msgspec
import pytest
import torch

from petals.client.session.replies import HopReply, PendingReply, ReplayBuffer, Replies
from petals.errors import PeerUnreachable, PetalsError
from petals.testing.manual_clock import settle
from petals.wire.header import RequestHeader
from petals.wire.replies import ForwardFailed, ReplayDone, StepResult
from petals.wire.requests import ReplayPart


@dataclass
class FakeHop:
    session_id: bytes
    epoch: int = 3

    def header(self, request_id: int) -> RequestHeader:
        return RequestHeader(self.session_id, self.epoch, request_id)


def headers(hops: list[FakeHop], request_id: int) -> list[RequestHeader]:
    return [hop.header(request_id) for hop in hops]


async def is_done(task: "asyncio.Task[HopReply | None]") -> bool:
    await settle()
    return task.done()


def result(header: RequestHeader) -> StepResult:
    return StepResult(header, 0.0, 0.0, 1)


@pytest.fixture
def hops() -> list[FakeHop]:
    return [FakeHop(bytes([number]) * 16) for number in range(3)]


async def waiting(pending: PendingReply, seconds: float = 10.0) -> "asyncio.Task[HopReply | None]":
    """A request that is sent, and waits."""
    sent = asyncio.Event()

    async def send() -> None:
        sent.set()

    task = asyncio.create_task(pending.receive(seconds, send))
    await sent.wait()
    return task


async def test_any_hop_may_answer_and_the_first_answer_counts(hops: list[FakeHop]) -> None:
    replies = Replies(lambda peer, seconds: None)
    with replies.expect(headers(hops, 7)) as pending:
        task = await waiting(pending)
        for hop in (hops[2], hops[0]):
            header = hop.header(7)
            replies.take(header, result(header), ())
        reply = await task
    assert reply is not None and reply.session_id == hops[2].session_id


@pytest.mark.parametrize(
    "changes",
    [{"session_id": b"x" * 16}, {"epoch": 2}, {"epoch": 4}, {"request_id": 6}, {"request_id": 8}],
    ids=str,
)
async def test_all_fields_of_the_header_count(
    hops: list[FakeHop], changes: dict[str, object]
) -> None:
    replies = Replies(lambda peer, seconds: None)
    with replies.expect(headers(hops, 7)) as pending:
        task = await waiting(pending)
        other = msgspec.structs.replace(hops[1].header(7), **changes)
        for message in (result(other), ReplayDone(other), PetalsError("no")):
            replies.take(other, message, ())
        assert not await is_done(task)
        task.cancel()


async def test_an_answer_after_the_request_is_dropped(hops: list[FakeHop]) -> None:
    replies, header = Replies(lambda peer, seconds: None), hops[0].header(7)
    with replies.expect(headers(hops, 7)):
        pass
    replies.take(header, result(header), ())
    with replies.expect(headers(hops, 8)) as pending:
        task = await waiting(pending)
        replies.take(header, result(header), ())
        assert not await is_done(task)
        task.cancel()


async def test_a_hop_behind_the_request_does_not_count(hops: list[FakeHop]) -> None:
    replies = Replies(lambda peer, seconds: None)
    with replies.expect(headers(hops, 7)) as pending:
        pending.session_ids = [hop.session_id for hop in hops[1:]]
        task = await waiting(pending)
        header = hops[0].header(7)
        replies.take(header, result(header), ())
        assert not await is_done(task)
        task.cancel()


async def test_a_loss_answers_all_requests_of_the_hop(hops: list[FakeHop]) -> None:
    replies = Replies(lambda peer, seconds: None)
    error = PeerUnreachable("gone")
    with replies.expect(headers(hops, 7)) as first, replies.expect(headers(hops[:1], 8)) as second:
        tasks = [await waiting(first), await waiting(second)]
        replies.lose(hops[2].session_id, error)
        reply = await tasks[0]
        assert reply is not None and reply.message is error
        assert not await is_done(tasks[1])
        tasks[1].cancel()


async def test_a_hop_reports_a_loss_once(hops: list[FakeHop]) -> None:
    replies, header = Replies(lambda peer, seconds: None), hops[0].header(7)
    with replies.expect(headers(hops, 7)) as pending:
        for is_first in (True, False):
            task = await waiting(pending)
            replies.take(header, ForwardFailed(header), ())
            assert await is_done(task) is is_first
        last = hops[2].header(7)
        replies.take(last, ForwardFailed(last), ())  # it forwards to no hop
        assert not await is_done(task)
        task.cancel()


async def test_a_request_ends_after_its_time_even_while_it_is_sent(hops: list[FakeHop]) -> None:
    replies = Replies(lambda peer, seconds: None)
    with replies.expect(headers(hops, 7)) as pending:
        assert await pending.receive(0.0, asyncio.Event().wait) is None


async def test_progress_shortens_paced_requests_only(hops: list[FakeHop]) -> None:
    replies = Replies(lambda peer, seconds: None)
    with replies.expect(headers(hops, 7)) as paced, replies.expect(headers(hops, 8)) as other:
        paced.is_paced = True
        tasks = [await waiting(paced, 100.0), await waiting(other, 100.0)]
        replies.limit(0.0)
        assert await tasks[0] is None
        replies.limit(0.0)  # one that is over already
        assert not await is_done(tasks[1])
        tasks[1].cancel()


def part(header: RequestHeader, index: int, start: int, count: int, **more: object) -> ReplayPart:
    return ReplayPart(header, index, 5, (start,), (count,), **more)


def rows(count: int) -> list[torch.Tensor]:
    return [torch.ones(count, 4)]


async def test_a_replay_to_the_client_is_put_together(hops: list[FakeHop]) -> None:
    replies, header = Replies(lambda peer, seconds: None), hops[0].header(7)
    buffer = ReplayBuffer(6, 4, torch.float32, (2,))
    with replies.expect(headers(hops[:1], 7), buffer) as pending:
        task = await waiting(pending)
        replies.take(header, part(header, 0, 2, 3, reorder=(0,)), rows(3))
        assert not await is_done(task)
        replies.take(header, part(header, 1, 5, 3, ends=True), rows(3))
        reply = await task
    assert reply is not None and isinstance(reply.message, ReplayPart)
    assert buffer.rows is not None
    assert (buffer.rows.starts, buffer.rows.counts) == ((2,), (6,))


WRONG = {
    "a part that came before": ((0, 0, 2), rows(2)),
    "a part is missing": ((2, 2, 2), rows(2)),
    "a gap": ((1, 3, 2), rows(2)),
    "more than was asked for": ((1, 2, 5), rows(5)),
    "another width": ((1, 2, 2), [torch.ones(2, 3)]),
    "another type": ((1, 2, 2), [torch.ones(2, 4).half()]),
    "not finite": ((1, 2, 2), [torch.full((2, 4), torch.inf)]),
    "nothing": ((1, 2, 2), []),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
async def test_a_replay_that_cannot_be_right_is_misbehaviour(
    hops: list[FakeHop], case: tuple[tuple[int, int, int], list[torch.Tensor]]
) -> None:
    numbers, tensors = case
    replies, header = Replies(lambda peer, seconds: None), hops[0].header(7)
    buffer = ReplayBuffer(6, 4, torch.float32)
    with replies.expect(headers(hops[:1], 7), buffer) as pending:
        task = await waiting(pending)
        replies.take(header, part(header, 0, 0, 2, reorder=(0,)), rows(2))
        replies.take(header, part(header, *numbers), tensors)
        reply = await task
    assert reply is not None and buffer.wrong
