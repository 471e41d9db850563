"""A session through several hops gives what the blocks give in one place."""

import asyncio
import logging
from collections.abc import Sequence

import msgspec
import pytest
import torch
from torch import Tensor

from petals.client.routing.route import Needs
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.replies import Replies
from petals.client.session.rows import SessionRows
from petals.errors import (
    BadInput,
    BatchTooLarge,
    LengthExceeded,
    MissingBlocksError,
    PeerMisbehaved,
    PetalsError,
    RequestError,
    SessionClosed,
    SessionGap,
)
from petals.server.config import ClientLimits
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES
from petals.types import BlockSpan, Hop, PeerId
from petals.wire.fields import Message
from petals.wire.replies import StepResult
from petals.wire.requests import GetInfo, KeepSession, OpenSession, ReplayPart, Step
from support.models import WIDTH
from support.reference import assert_close, states
from support.server_faults import Said, wrong_outputs, wrong_replays
from support.service import Served, Worker, split

LogCapture = pytest.LogCaptureFixture
THREE = ((0, 2), (2, 4), (4, 6))


def num_asked(swarm: Served, kind: type[Message]) -> list[int]:
    """Messages of one type that each server has got."""
    return [len(worker.faults.all(kind)) for worker in swarm.workers]


async def banned(swarm: Served, connection: SwarmConnection) -> frozenset[PeerId]:
    return frozenset((await connection.view()).bans.at(swarm.client.clock.monotonic()))


async def know(connection: SwarmConnection, spare: Worker) -> None:
    """The client knows a new server and how far away it is."""
    view = await connection.view()
    await view.refresh()
    await view.measure([spare.peer_id])


def computing_for(seconds: float) -> object:
    """A rewrite of results: the server says that each step took so long."""

    def rewrite(message: Message, tensors: Sequence[Tensor]) -> Said:
        if isinstance(message, StepResult):
            times = {"queue_seconds": 0.001, "compute_seconds": seconds}
            message = msgspec.structs.replace(message, **times)
        return message, tensors

    return rewrite


async def decode(session: SessionRows, swarm: Served, text: Tensor, start: int) -> None:
    """The tokens of ``text`` from ``start`` on, one in each step, come out right."""
    wanted = swarm.expected(text)
    for at in range(start, len(text)):
        output = await session.step(text[at : at + 1], (at,), (1,))
        assert_close(output, wanted[at : at + 1])


async def test_prefill_and_decode() -> None:
    async with split(*THREE) as swarm:
        session, text = swarm.session(), states(9)
        output = await session.step(text[:6], (0,), (6,))
        assert_close(output, swarm.expected(text)[:6])
        await decode(session, swarm, text, 6)
        assert session.lengths == (9,)
        assert num_asked(swarm, OpenSession) == [1, 1, 1]
        await session.close()
        await swarm.at_rest()


async def test_rolling_back_costs_no_trip() -> None:
    async with split(*THREE) as swarm:
        session, text, other = swarm.session(), states(6), states(3, seed=5)
        await session.step(text, (0,), (6,))
        session.rewind(2)
        output = await session.step(other, (2,), (3,))
        assert_close(output, swarm.expected(torch.cat([text[:2], other]))[2:])
        assert num_asked(swarm, Step) == [2, 2, 2]
        with pytest.raises(SessionGap):
            session.rewind(6)


async def test_reorders_add_up_until_a_step_takes_them_along() -> None:
    async with split(*THREE) as swarm:
        session, rows = swarm.session(), [states(3, seed=number) for number in range(3)]
        await session.step(torch.cat(rows), (0, 0, 0), (3, 3, 3))
        nothing = torch.empty(0, WIDTH)
        await session.step(nothing, (3, 3, 3), (0, 0, 0), reorder=(2, 0, 1))
        new = states(2, seed=9)
        output = await session.step(new, (3, 1), (1, 1), reorder=(1, 1))
        kept = [torch.cat([rows[0], new[:1]]), torch.cat([rows[0][:1], new[1:]])]
        wanted = [swarm.expected(kept[0])[3:], swarm.expected(kept[1])[1:]]
        assert_close(output, torch.cat(wanted))
        reorders = [step.reorder for step in swarm.workers[2].faults.all(Step)]
        assert reorders == [None, (0, 0)]


async def test_zero_tokens_open_the_session() -> None:
    async with split(*THREE) as swarm:
        session = swarm.session()
        output = await session.step(torch.empty(0, WIDTH), (0, 0), (0, 0))
        assert output.shape == (0, WIDTH)
        assert session.is_open
        opened = [worker.faults.all(OpenSession)[0] for worker in swarm.workers]
        assert [opening.num_rows for opening in opened] == [2, 2, 2]
        assert num_asked(swarm, Step) == [0, 0, 0]


async def test_long_steps_are_cut_for_the_smallest_server_and_run_side_by_side() -> None:
    async with split(THREE[0]) as swarm:
        await swarm.add(2, 4, max_step_tokens=4)
        await swarm.add(4, 6)
        head, small, _ = swarm.workers
        session, rows = swarm.session(), [states(11, seed=1), states(6, seed=2)]
        release = small.hold()
        step = asyncio.create_task(session.step(torch.cat(rows), (0, 0), (11, 6)))
        # The first server works on the second part while the next one has the first.
        await head.faults.until_asked(Step, 2)
        release()
        assert_close(await step, torch.cat([swarm.expected(row) for row in rows]))
        assert [sum(part.counts) for part in small.faults.all(Step)] == [4, 4, 4, 4, 1]


@pytest.mark.parametrize(("spans", "num_parts"), [([(0, 6)], 1), (THREE, 3)])
async def test_a_long_prefill_is_cut_only_where_hops_can_share_it(
    spans: Sequence[tuple[int, int]], num_parts: int
) -> None:
    async with split(*spans) as swarm:
        session = swarm.session(prefill_chunk_tokens=4)
        await session.step(states(10), (0,), (10,))
        assert num_asked(swarm, Step)[0] == num_parts


@pytest.mark.parametrize(
    ("dtype", "travels"), [(torch.bfloat16, "bfloat16"), (torch.float64, "float32")]
)
async def test_states_come_back_in_the_dtype_they_came_in(dtype: torch.dtype, travels: str) -> None:
    async with split((0, 6)) as swarm:
        session = swarm.session()
        assert (await session.step(states(3).to(dtype), (0,), (3,))).dtype == dtype
        (opening,) = swarm.workers[0].faults.all(OpenSession)
        assert opening.dtype == travels


@pytest.mark.parametrize(
    ("hidden", "starts", "counts", "error"),
    [
        (torch.ones(2, WIDTH, dtype=torch.int64), (3,), (2,), BadInput),
        (torch.full((2, WIDTH), torch.nan), (3,), (2,), BadInput),
        (torch.full((2, WIDTH), torch.inf), (3,), (2,), BadInput),
        (torch.ones(2, WIDTH + 1), (3,), (2,), BadInput),
        (torch.ones(3, WIDTH), (3,), (2,), BadInput),
        (torch.ones(2, WIDTH), (3, 3), (1, 1), BadInput),
        (torch.ones(2, WIDTH), (4,), (2,), SessionGap),
        (torch.ones(2, WIDTH), (-1,), (2,), SessionGap),
        (torch.ones(18, WIDTH), (3,), (18,), LengthExceeded),
        (torch.ones(1025, WIDTH), (0,) * 1025, (1,) * 1025, BatchTooLarge),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_sent(
    hidden: Tensor, starts: tuple[int, ...], counts: tuple[int, ...], error: type[PetalsError]
) -> None:
    async with split((0, 6)) as swarm:
        session, text = swarm.session(), states(4)
        await session.step(text[:3], (0,), (3,))
        with pytest.raises(error) as caught:
            await session.step(hidden, starts, counts)
        assert caught.value.hint
        assert num_asked(swarm, Step) == [1]
        await decode(session, swarm, text, 3)


@pytest.mark.parametrize("answer", ["narrow", "nan", "half", "nothing"])
async def test_a_server_that_answers_wrong_is_named_and_banned(answer: str) -> None:
    async with split(*THREE) as swarm:
        liar, connection = swarm.workers[1], swarm.connection()
        liar.faults.rewrite = wrong_outputs(answer)
        with pytest.raises(MissingBlocksError) as caught:
            await swarm.session(connection).step(states(2), (0,), (2,))
        assert isinstance(caught.value.__cause__, PeerMisbehaved)
        assert caught.value.__cause__.peer_id == liar.peer_id
        assert await banned(swarm, connection) == {liar.peer_id}


@pytest.mark.parametrize("end", ["refused", "interrupted"])
async def test_a_reorder_that_did_not_end_is_not_done_twice(end: str) -> None:
    async with split(*THREE) as swarm:
        session, middle = swarm.session(), swarm.workers[1]
        rows, new = [states(3, seed=number) for number in range(2)], states(2, seed=7)
        await session.step(torch.cat(rows), (0, 0), (3, 3))
        reordering = session.step(new, (3, 3), (1, 1), reorder=(1, 0))
        if end == "refused":
            middle.faults.refusals[Step].append(BadInput("no"))
            with pytest.raises(BadInput):
                await reordering
        else:
            release, step = middle.hold(), asyncio.create_task(reordering)
            await middle.faults.until_asked(Step, 2)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            release()
        output = await session.step(new, (3, 3), (1, 1), reorder=(1, 0))
        kept = [torch.cat([rows[1], new[:1]]), torch.cat([rows[0], new[1:]])]
        assert_close(output, torch.cat([swarm.expected(row)[3:] for row in kept]))
        await session.close()
        await swarm.at_rest()


async def test_an_idle_session_gives_signs_of_life() -> None:
    async with split((0, 6), door=ClientLimits(lease_seconds=0.15)) as swarm:
        session = swarm.session()
        await session.step(states(3), (0,), (3,))
        await swarm.workers[0].faults.until_asked(KeepSession, 2)


async def test_closing_does_not_wait_for_a_step() -> None:
    async with split(*THREE) as swarm:
        session, busy = swarm.session(), swarm.workers[1]
        release = busy.hold()
        step = asyncio.create_task(session.step(states(2), (0,), (2,)))
        await busy.faults.until_asked(Step)
        closing = asyncio.create_task(session.close())
        with pytest.raises(PetalsError):
            await step
        release()
        await closing
        await swarm.at_rest()


async def test_closing_while_it_opens_leaves_nothing_open() -> None:
    async with split((0, 6), num_tokens=32) as swarm:
        (server,) = swarm.workers
        holder, session = swarm.session(), swarm.session()
        await holder.step(states(1), (0,), (1,))
        step = asyncio.create_task(session.step(states(2), (0,), (2,)))
        await server.faults.until_asked(OpenSession, 3)
        await session.close()
        await holder.close()
        with pytest.raises(SessionClosed):
            await step
        await swarm.at_rest()


@pytest.fixture
def log(caplog: LogCapture, monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    """What clients log for their users."""
    monkeypatch.setattr(logging.getLogger("petals"), "propagate", True)
    caplog.set_level("INFO", logger="petals.client")
    return caplog


@pytest.mark.parametrize(
    ("setting", "told"), [(False, []), ("inference", ["session through"]), (True, ["route:"])]
)
async def test_routes_are_shown_as_asked(setting: object, told: list[str], log: LogCapture) -> None:
    async with split((0, 6)) as swarm:
        await swarm.session(show_route=setting).step(states(1), (0,), (1,))
        shown = f"0:6 at …{swarm.workers[0].peer_id[-6:]}"
        lines = [record.getMessage() for record in log.records]
        assert [line for line in lines if shown in line] == [f"{words} {shown}" for words in told]


async def test_a_repair_is_one_line_for_the_user(log: LogCapture) -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection()
        session = swarm.session(connection)
        await session.step(states(3), (0,), (3,))
        spare = await swarm.add(2, 4)
        await (await connection.view()).refresh()
        lost = swarm.workers[1].peer_id
        swarm.net.kill(lost)
        await session.step(states(1), (3,), (1,))
        told = [record for record in log.records if record.name.endswith("session.supervisor")]
        (line,) = [record.getMessage() for record in told]
        assert line.startswith(f"blocks 2:4 of …{lost[-6:]}")
        assert line.endswith(f"2:4 at …{spare.peer_id[-6:]}")


async def test_without_a_length_the_server_sets_it() -> None:
    async with split((0, 6), max_length=8) as swarm:
        session = swarm.session(max_length=None)
        await session.step(states(3), (0,), (3,))
        assert session.max_length == 8
        with pytest.raises(LengthExceeded):
            await session.step(states(6), (3,), (6,))


async def test_the_trace_tells_where_time_went() -> None:
    async with split(*THREE) as swarm:
        session, text = swarm.session(), states(4)
        swarm.workers[0].faults.rewrite = computing_for(0.002)
        await session.step(text[:3], (0,), (3,))
        await session.step(text[3:], (3,), (1,))
        trace = session.trace
        assert [hop.peer_id for hop in trace.hops] == [w.peer_id for w in swarm.workers]
        assert len(trace.step_seconds) == 2
        hop = trace.hops[0]
        assert [step.num_tokens for step in hop.steps] == [3, 1]
        assert (hop.median_seconds("queue"), hop.median_seconds("compute")) == (0.001, 0.002)
        assert hop.overhead_seconds == pytest.approx(hop.median_seconds() - 0.003)


async def test_a_slow_server_is_left_for_a_faster_one() -> None:
    async with split(*THREE) as swarm:
        connection, text, slow = swarm.connection(), states(9), swarm.workers[1]
        session = swarm.session(connection)
        slow.faults.rewrite = computing_for(5.0)
        await session.step(text[:3], (0,), (3,))
        spare = await swarm.add(2, 4)
        spare.faults.rewrite = computing_for(5.0)
        await know(connection, spare)
        await decode(session, swarm, text[:8], 3)
        assert session.trace.hops[1].peer_id == spare.peer_id
        assert [len(worker.faults.all(Step)) for worker in (slow, spare)] == [3, 3]
        assert num_asked(swarm, ReplayPart) == [0, 0, 0, 1]
        (repair,) = session.trace.repairs
        assert repair.peer_id == slow.peer_id
        assert "slow" in repair.reason
        swarm.net.kill(spare.peer_id)
        await decode(session, swarm, text, 8)
        assert session.trace.hops[1].peer_id == slow.peer_id


async def test_a_slow_server_is_kept_while_the_faster_one_is_full() -> None:
    async with split(*THREE) as swarm:
        connection, text = swarm.connection(max_pinged=3), states(8)
        session = swarm.session(connection)
        swarm.workers[1].faults.rewrite = computing_for(5.0)
        await session.step(text[:3], (0,), (3,))
        await know(connection, await swarm.add(2, 4, num_tokens=16))
        await decode(session, swarm, text, 3)
        assert not session.trace.repairs


async def test_a_server_that_lives_and_never_answers_is_left_if_another_is_known() -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection(step_timeout=0.02, hung_seconds=0.3)
        session, text, hung = swarm.session(connection), states(5), swarm.workers[1]
        await session.step(text[:3], (0,), (3,))
        release = hung.hold()
        waiting = asyncio.create_task(decode(session, swarm, text[:4], 3))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await asyncio.shield(waiting)
        release()  # No other server has its blocks: there was nothing better than to wait.
        await waiting
        spare = await swarm.add(2, 4)
        await know(connection, spare)
        release = hung.hold()
        await decode(session, swarm, text, 4)
        (repair,) = session.trace.repairs
        assert repair.peer_id == hung.peer_id and "It lives" in repair.reason
        assert session.trace.hops[1].peer_id == spare.peer_id
        release()


@pytest.mark.parametrize("fault", RequestError.__subclasses__(), ids=lambda fault: fault.code)
async def test_what_one_server_refuses_another_runs_and_none_is_banned(
    fault: type[RequestError],
) -> None:
    async with split(*THREE, THREE[1]) as swarm:
        connection, text = swarm.connection(max_retries=0), states(4)
        session = swarm.session(connection)
        await session.step(text[:2], (0,), (2,))
        one = swarm.server_of(session, 1)
        (other,) = {w for w in swarm.workers if w.blocks == one.blocks and w is not one}
        refusals = [worker.faults.refusals[Step] for worker in (one, other)]
        refusals[0] += [fault("This cannot be.") for _ in range(9)]
        await decode(session, swarm, text[:3], 2)
        assert len(refusals[0]) == 8
        assert swarm.server_of(session, 1) is other
        refusals[1] += [fault("Neither this.") for _ in range(9)]
        with pytest.raises(fault, match="cannot|Neither") as caught:
            await session.step(text[3:], (3,), (1,))
        assert "says: " in str(caught.value)
        assert sorted(map(len, refusals)) == [7, 8]
        assert not await banned(swarm, connection)
        for errors in refusals:
            errors.clear()
        await decode(session, swarm, text, 3)


async def test_a_reply_that_cannot_be_read_ends_the_hop_and_not_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with split(*THREE, *THREE) as swarm:
        session, text, failed, take = swarm.session(), states(6), [], Replies.take

        def fail_once(replies: Replies, *reply: object) -> None:
            if not failed:
                failed.append(reply)
                raise RuntimeError("a bug of ours")
            take(replies, *reply)

        monkeypatch.setattr(Replies, "take", fail_once)
        assert_close(await session.step(text, (0,), (6,)), swarm.expected(text))
        (repair,) = session.trace.repairs
        assert failed and "could not be read" in repair.reason


async def test_a_hop_cannot_answer_for_another() -> None:
    """It knows the id of the hop behind it, since it forwards to it; the client here does, too."""
    async with split(*THREE) as swarm:
        session, text, (first, second, _) = swarm.session(), states(4), swarm.workers
        await session.step(text[:2], (0,), (2,))
        release = second.hold()
        step = asyncio.create_task(session.step(text[2:], (2,), (2,)))
        await second.faults.until_asked(Step, 2)
        forged = StepResult(second.faults.all(Step)[-1].header, 0.0, 0.0, 2)
        channel = first.faults.channels[-1]
        await channel.send(forged, [torch.ones(2, WIDTH)])
        await channel.ping()
        release()
        assert_close(await step, swarm.expected(text)[2:])


async def test_a_server_that_reports_losses_and_never_answers_is_replaced() -> None:
    async with split(*THREE, THREE[1]) as swarm:
        session, text = swarm.session(request_timeout=1.0), states(6)
        await session.step(text[:3], (0,), (3,))
        liar = swarm.server_of(session, 1)
        liar.faults.loses_steps = True
        output = await session.step(text[3:], (3,), (3,))
        assert_close(output, swarm.expected(text)[3:])
        assert len(liar.faults.all(Step)) < 5
        assert [repair.peer_id for repair in session.trace.repairs] == [liar.peer_id]


async def test_a_server_that_takes_no_data_is_replaced() -> None:
    """It answers pings, and gives no credit for what is more than its window."""
    num_rows, length = 64, 1100
    num_tokens = num_rows * length
    assert num_tokens * states(1).nbytes > WINDOW_BYTES
    room = {"max_rows": num_rows, "max_step_tokens": num_tokens, "num_tokens": 2 * num_tokens}
    async with split(*THREE, THREE[1], max_length=2 * length, **room) as swarm:
        session = swarm.session(
            max_length=length, request_timeout=4.0, prefill_chunk_tokens=num_tokens
        )
        rows = torch.stack([states(length, seed=row) for row in range(num_rows)])

        async def step(start: int, end: int) -> Tensor:
            counts = (end - start,) * num_rows
            return await session.step(rows[:, start:end].flatten(0, 1), (start,) * num_rows, counts)

        await step(0, 1)
        deaf = swarm.server_of(session, 1)
        deaf.faults.is_reading.clear()
        await step(1, 2)
        outputs = (await step(2, length)).view(num_rows, length - 2, WIDTH)
        deaf.faults.is_reading.set()
        for row, output in zip(rows, outputs):
            assert_close(output, swarm.expected(row)[2:])
        assert len(deaf.faults.all(Step)) == 2
        (repair,) = session.trace.repairs
        assert repair.peer_id == deaf.peer_id and repair.stall_seconds < 15.0


@pytest.mark.parametrize("replay", ["gap", "long", "narrow", "nan"])
async def test_rows_that_cannot_be_refill_nobody(replay: str) -> None:
    """The predecessor of a lost hop sends nonsense: it is banned, and the session goes on."""
    async with split(*THREE, *THREE[:2]) as swarm:
        connection, text = swarm.connection(), states(6)
        session = swarm.session(connection)
        await session.step(text[:4], (0,), (4,))
        first, lost, _ = (hop.peer_id for hop in session.trace.hops)
        swarm.server_of(session, 0).faults.rewrite = wrong_replays(replay)
        swarm.net.kill(lost)
        await decode(session, swarm, text, 4)
        assert {repair.peer_id for repair in session.trace.repairs} == {first, lost}
        assert first in await banned(swarm, connection)


async def test_spares_are_asked_until_one_has_room() -> None:
    async with split(*THREE) as swarm:
        view = await swarm.connection(max_measured=0).view()
        spares = [await swarm.add(2, 4, num_tokens=room) for room in (16, 16, 32, 32)]
        for spare, rate in zip(spares, (4000, 3000, 2000, 1000)):
            await spare.announce(inference_rps=rate)
        await view.refresh()
        peer = swarm.workers[1].peer_id
        await view.warm_spares((Hop(peer, BlockSpan(2, 4)),), cache_tokens=20)
        assert [len(spare.faults.all(GetInfo)) for spare in spares] == [1, 1, 1, 0]
        needs = Needs(blocks=BlockSpan(2, 4), cache_tokens=20, exclude=frozenset({peer}))
        assert (await view.route(needs))[0].peer_id == spares[2].peer_id
