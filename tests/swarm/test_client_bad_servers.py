"""Servers that are slow, hung, deaf, refusing or lying are replaced, and the numbers stay right."""

import asyncio

import pytest
import torch
from torch import Tensor

from petals.client.routing.route import Needs
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.hop import HopReply
from petals.client.session.pipeline import PendingReply
from petals.errors import (
    BadInput,
    MissingBlocksError,
    PeerMisbehaved,
    RequestError,
)
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES
from petals.types import BlockSpan, Hop
from petals.wire.replies import StepResult
from petals.wire.requests import GetInfo, OpenSession, ReplayPart, Step
from support.models import WIDTH
from support.reference import assert_close, states
from support.server_faults import computing_for, wrong_outputs, wrong_replays
from support.service import Worker, split

LogCapture = pytest.LogCaptureFixture
THREE = ((0, 2), (2, 4), (4, 6))


async def know(connection: SwarmConnection, spare: Worker) -> None:
    """The client knows a new server and how far away it is."""
    view = await connection.view()
    await view.refresh()
    await view.measure([spare.peer_id])


async def test_a_slow_server_is_left_for_a_faster_one() -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection(straggler_look_seconds=0.0)
        text, slow = states(9), swarm.workers[1]
        session = swarm.session(connection)
        slow.faults.rewrite = computing_for(5.0)
        await session.step(text[:3], (0,), (3,))
        spare = await swarm.add(2, 4)
        spare.faults.rewrite = computing_for(5.0)
        await know(connection, spare)
        await swarm.decode(session, text[:7], 3)
        await spare.until(lambda: bool(session.trace.repairs))
        await swarm.decode(session, text[:8], 7)
        assert session.trace.hops[1].peer_id == spare.peer_id
        assert len(spare.faults.all(Step)) == 1
        assert swarm.num_asked(ReplayPart)[3] >= 1
        (repair,) = session.trace.repairs
        assert repair.peer_id == slow.peer_id
        assert "slow" in repair.reason
        swarm.net.kill(spare.peer_id)
        await swarm.decode(session, text, 8)
        assert session.trace.hops[1].peer_id == slow.peer_id


async def test_a_slow_server_serves_on_if_the_faster_one_refuses() -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection(straggler_look_seconds=0.0)
        text, slow = states(8), swarm.workers[1]
        session = swarm.session(connection)
        slow.faults.rewrite = computing_for(5.0)
        await session.step(text[:3], (0,), (3,))
        spare = await swarm.add(2, 4)
        refusals = spare.faults.refusals[OpenSession]
        refusals += [BadInput("Not you.") for _ in range(9)]
        await know(connection, spare)
        await swarm.decode(session, text, 3)
        assert len(refusals) < 9
        assert not session.trace.repairs
        assert session.trace.hops[1].peer_id == slow.peer_id


async def test_a_slow_server_is_kept_while_the_faster_one_is_full() -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection(max_pinged=3, straggler_look_seconds=0.0)
        text = states(8)
        session = swarm.session(connection)
        swarm.workers[1].faults.rewrite = computing_for(5.0)
        await session.step(text[:3], (0,), (3,))
        await know(connection, await swarm.add(2, 4, num_tokens=16))
        await swarm.decode(session, text, 3)
        assert not session.trace.repairs


async def test_a_server_that_lives_and_never_answers_is_left_if_another_is_known() -> None:
    async with split(*THREE) as swarm:
        connection = swarm.connection(step_timeout=0.02, hung_seconds=0.3)
        session, text, hung = swarm.session(connection), states(5), swarm.workers[1]
        await session.step(text[:3], (0,), (3,))
        release = hung.hold()
        waiting = asyncio.create_task(swarm.decode(session, text[:4], 3))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await asyncio.shield(waiting)
        release()  # No other server has its blocks: there was nothing better than to wait.
        await waiting
        spare = await swarm.add(2, 4)
        await know(connection, spare)
        release = hung.hold()
        await swarm.decode(session, text, 4)
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
        await swarm.decode(session, text[:3], 2)
        assert len(refusals[0]) == 8
        assert swarm.server_of(session, 1) is other
        refusals[1] += [fault("Neither this.") for _ in range(9)]
        with pytest.raises(fault, match="cannot|Neither") as caught:
            await session.step(text[3:], (3,), (1,))
        assert "says: " in str(caught.value)
        assert sorted(map(len, refusals)) == [7, 8]
        assert not await swarm.banned(connection)
        for errors in refusals:
            errors.clear()
        await swarm.decode(session, text, 3)


async def test_a_reply_that_cannot_be_read_ends_the_hop_and_not_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with split(*THREE, *THREE) as swarm:
        session, text, failed, take = swarm.session(), states(6), [], PendingReply.take

        def fail_once(pending: PendingReply, reply: HopReply) -> None:
            if not failed:
                failed.append(reply)
                raise RuntimeError("a bug of ours")
            take(pending, reply)

        monkeypatch.setattr(PendingReply, "take", fail_once)
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
        await swarm.decode(session, text, 4)
        assert {repair.peer_id for repair in session.trace.repairs} == {first, lost}
        assert first in await swarm.banned(connection)


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


@pytest.mark.parametrize("answer", ["narrow", "nan", "half", "nothing"])
async def test_a_server_that_answers_wrong_is_named_and_banned(answer: str) -> None:
    async with split(*THREE) as swarm:
        liar, connection = swarm.workers[1], swarm.connection()
        liar.faults.rewrite = wrong_outputs(answer)
        with pytest.raises(MissingBlocksError) as caught:
            await swarm.session(connection).step(states(2), (0,), (2,))
        assert isinstance(caught.value.__cause__, PeerMisbehaved)
        assert caught.value.__cause__.peer_id == liar.peer_id
        assert await swarm.banned(connection) == {liar.peer_id}
