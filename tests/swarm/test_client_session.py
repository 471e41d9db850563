"""A session through several hops gives what the blocks give in one place."""

import asyncio
import logging

import pytest
import torch

from petals.client.routing.route import Needs
from petals.client.session.hop import HopReply
from petals.client.session.pipeline import PendingReply
from petals.client.session.rows import SessionRows
from petals.errors import (
    BadInput,
    BatchTooLarge,
    LengthExceeded,
    MissingBlocksError,
    PeerFailed,
    PeerMisbehaved,
    PetalsError,
    RequestError,
    SessionClosed,
    SessionGap,
)
from petals.types import BlockSpan, Hop
from petals.wire.replies import StepResult
from support.fake_server import HIDDEN, expected, open_one, states, toy_swarm

ALL = BlockSpan(0, 6)
THREE = ((0, 2), (2, 4), (4, 6))


async def test_prefill_and_decode() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text = states(9)
        parts = [await session.step(text[:6], (0,), (6,))]
        for at in range(6, 9):
            parts.append(await session.step(text[at : at + 1], (at,), (1,)))
        torch.testing.assert_close(torch.cat(parts), expected(text, ALL))
        assert session.lengths == (9,)
        assert [len(server.opened) for server in swarm.servers] == [1, 1, 1]
        await session.close()
        assert await swarm.at_rest()


async def test_overlapping_servers_and_a_part_of_the_model() -> None:
    async with toy_swarm((0, 4), (3, 6)) as swarm:
        part = BlockSpan(1, 6)
        session = SessionRows(swarm.access(6), part, max_length=20)
        text = states(5)
        output = await session.step(text, (0,), (5,))
        torch.testing.assert_close(output, expected(text, part))
        await session.close()


async def test_rows_of_different_lengths() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        one, two = states(4, seed=1), states(7, seed=2)
        output = await session.step(torch.cat([one[:3], two[:7]]), (0, 0), (3, 7))
        more = await session.step(one[3:], (3, 7), (1, 0))
        whole = torch.cat([output[:3], more, output[3:]])
        wanted = torch.cat([expected(one, ALL), expected(two, ALL)])
        torch.testing.assert_close(whole, wanted)
        await session.close()


async def test_rolling_back_costs_no_trip() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text, other = states(6), states(3, seed=5)
        await session.step(text, (0,), (6,))
        output = await session.step(other, (2,), (3,))
        torch.testing.assert_close(output, expected(torch.cat([text[:2], other]), ALL)[2:])
        assert [len(server.steps) for server in swarm.servers] == [2, 2, 2]
        with pytest.raises(SessionGap):
            await session.step(other, (6,), (3,))
        await session.close()


async def test_reorders_add_up_until_a_step_takes_them_along() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        rows = [states(3, seed=number) for number in range(3)]
        await session.step(torch.cat(rows), (0, 0, 0), (3, 3, 3))
        nothing = torch.empty(0, HIDDEN)
        await session.step(nothing, (3, 3, 3), (0, 0, 0), reorder=(2, 0, 1))
        new = states(2, seed=9)
        output = await session.step(new, (3, 1), (1, 1), reorder=(1, 1))
        kept = [torch.cat([rows[0], new[:1]]), torch.cat([rows[0][:1], new[1:]])]
        wanted = [expected(kept[0], ALL)[3:], expected(kept[1], ALL)[1:]]
        torch.testing.assert_close(output, torch.cat(wanted))
        assert [step.reorder for step in swarm.servers[2].steps] == [None, (0, 0)]
        await session.close()


async def test_zero_tokens_open_the_session() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        output = await session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))
        assert output.shape == (0, HIDDEN)
        assert session.is_open
        assert [server.opened[0].num_rows for server in swarm.servers] == [2, 2, 2]
        assert not swarm.servers[0].steps
        await session.close()


async def test_long_steps_are_cut_for_the_smallest_server_and_run_side_by_side() -> None:
    async with toy_swarm(*THREE) as swarm:
        swarm.servers[1].max_batch_tokens = 4
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        one, two = states(11, seed=1), states(6, seed=2)
        output = await session.step(torch.cat([one, two]), (0, 0), (11, 6))
        wanted = torch.cat([expected(one, ALL), expected(two, ALL)])
        torch.testing.assert_close(output, wanted)
        counts = [sum(step.counts) for step in swarm.servers[1].steps]
        assert counts == [4, 4, 4, 4, 1]
        assert swarm.servers[0].max_under_way > 1
        await session.close()


async def test_long_prefill_is_cut_only_where_hops_can_share_it() -> None:
    async with toy_swarm((0, 6)) as swarm:
        session = SessionRows(swarm.access(6, prefill_chunk_tokens=4), ALL, max_length=20)
        await session.step(states(10), (0,), (10,))
        assert len(swarm.servers[0].steps) == 1
        await session.close()
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6, prefill_chunk_tokens=4), ALL, max_length=20)
        await session.step(states(10), (0,), (10,))
        assert len(swarm.servers[0].steps) == 3
        await session.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
async def test_states_come_back_in_the_dtype_they_came_in(dtype: torch.dtype) -> None:
    async with toy_swarm((0, 6)) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        assert (await session.step(states(3).to(dtype), (0,), (3,))).dtype == dtype
        travels = {torch.bfloat16: "bfloat16", torch.float64: "float32"}[dtype]
        assert swarm.servers[0].opened[0].dtype == travels
        await session.close()


@pytest.mark.parametrize(
    ("hidden", "starts", "counts", "error"),
    [
        (torch.ones(2, HIDDEN, dtype=torch.int64), (3,), (2,), BadInput),
        (torch.full((2, HIDDEN), torch.nan), (3,), (2,), BadInput),
        (torch.full((2, HIDDEN), torch.inf), (3,), (2,), BadInput),
        (torch.ones(2, HIDDEN + 1), (3,), (2,), BadInput),
        (torch.ones(3, HIDDEN), (3,), (2,), BadInput),
        (torch.ones(2, HIDDEN), (3, 3), (1, 1), BadInput),
        (torch.ones(2, HIDDEN), (4,), (2,), SessionGap),
        (torch.ones(2, HIDDEN), (-1,), (2,), SessionGap),
        (torch.ones(18, HIDDEN), (3,), (18,), LengthExceeded),
        (torch.ones(1025, HIDDEN), (0,) * 1025, (1,) * 1025, BatchTooLarge),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_sent(
    hidden: torch.Tensor, starts: tuple[int, ...], counts: tuple[int, ...], error: type[PetalsError]
) -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text = states(4)
        await session.step(text[:3], (0,), (3,))
        with pytest.raises(error) as caught:
            await session.step(hidden, starts, counts)
        assert caught.value.hint
        assert len(swarm.servers[0].steps) == 1
        output = await session.step(text[3:], (3,), (1,))
        torch.testing.assert_close(output, expected(text, ALL)[3:])
        await session.close()


@pytest.mark.parametrize("answer", ["narrow", "nan", "half", "nothing"])
async def test_a_server_that_answers_wrong_is_named_and_banned(answer: str) -> None:
    async with toy_swarm(*THREE) as swarm:
        bad = swarm.servers[1]
        access = swarm.access(6)
        session = SessionRows(access, ALL, max_length=20)
        bad.answer = answer
        with pytest.raises(MissingBlocksError) as caught:
            await session.step(states(2), (0,), (2,))
        assert isinstance(caught.value.__cause__, PeerMisbehaved)
        assert caught.value.__cause__.peer_id == bad.peer_id
        view = await access.view()
        assert view.bans.at(swarm.client.clock.monotonic()) == {bad.peer_id}
        await session.close()


async def test_a_refused_step_leaves_the_session_where_it_was() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text = states(5)
        await session.step(text[:3], (0,), (3,))
        swarm.servers[1].refuse_steps.append(BadInput("no"))
        with pytest.raises(BadInput):
            await session.step(text[3:], (3,), (2,))
        output = await session.step(text[3:], (3,), (2,))
        torch.testing.assert_close(output, expected(text, ALL)[3:])
        await session.close()


async def test_a_refused_step_has_not_reordered_anything() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        rows, new = [states(3, seed=number) for number in range(2)], states(2, seed=7)
        await session.step(torch.cat(rows), (0, 0), (3, 3))
        swarm.servers[1].refuse_steps.append(BadInput("no"))
        with pytest.raises(PetalsError):
            await session.step(new, (3, 3), (1, 1), reorder=(1, 0))
        output = await session.step(new, (3, 3), (1, 1), reorder=(1, 0))
        wanted = [expected(torch.cat([rows[1 - i], new[i : i + 1]]), ALL)[3:] for i in range(2)]
        torch.testing.assert_close(output, torch.cat(wanted))
        await session.close()


async def test_a_reorder_that_was_interrupted_is_not_done_twice() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        rows, new = [states(3, seed=number) for number in range(2)], states(2, seed=7)
        await session.step(torch.cat(rows), (0, 0), (3, 3))
        swarm.servers[1].held = asyncio.Event()
        step = asyncio.create_task(session.step(new, (3, 3), (1, 1), reorder=(1, 0)))
        await swarm.servers[1].until(lambda: len(swarm.servers[1].steps) == 2)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        swarm.servers[1].held.set()
        output = await session.step(new, (3, 3), (1, 1), reorder=(1, 0))
        wanted = [expected(torch.cat([rows[1 - i], new[i : i + 1]]), ALL)[3:] for i in range(2)]
        torch.testing.assert_close(output, torch.cat(wanted))
        await session.close()
        assert await swarm.at_rest()


async def test_an_interrupted_step_may_be_done_again() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text = states(5)
        await session.step(text[:3], (0,), (3,))
        swarm.servers[1].held = asyncio.Event()
        step = asyncio.create_task(session.step(text[3:], (3,), (2,)))
        await swarm.servers[1].until(lambda: len(swarm.servers[1].steps) == 2)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        swarm.servers[1].held.set()
        output = await session.step(text[3:], (3,), (2,))
        torch.testing.assert_close(output, expected(text, ALL)[3:])
        await session.close()


async def test_a_server_that_fails_at_every_step_is_left() -> None:
    async with toy_swarm(*THREE) as swarm:
        spare = await swarm.add(2, 4)
        swarm.servers[1].answer = spare.answer = "nan"
        session = SessionRows(swarm.access(6, max_retries=1), ALL, max_length=20)
        with pytest.raises(PeerMisbehaved):
            await session.step(states(2), (0,), (2,))
        spare.answer = "right"
        spare.refuse_steps.append(PeerFailed("no"))
        await session.close()


async def test_an_idle_session_gives_signs_of_life() -> None:
    async with toy_swarm((0, 6), lease_seconds=0.15) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        await session.step(states(3), (0,), (3,))
        await swarm.servers[0].until(lambda: swarm.servers[0].num_kept == 2)
        await session.close()


async def test_closing_does_not_wait_for_a_step() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        swarm.servers[1].held = asyncio.Event()
        step = asyncio.create_task(session.step(states(2), (0,), (2,)))
        await swarm.servers[1].until(lambda: len(swarm.servers[1].steps) == 1)
        await session.close()
        with pytest.raises(PetalsError):
            await step
        assert await swarm.at_rest()


async def test_closing_while_it_opens_leaves_nothing_open() -> None:
    async with toy_swarm((0, 6), max_sessions=1) as swarm:
        access = swarm.access(6)
        holder = await open_one(access, ALL)
        session = SessionRows(access, ALL, max_length=20)
        step = asyncio.create_task(session.step(states(2), (0,), (2,)))
        await swarm.servers[0].until_opened(3)
        await session.close()
        await holder.close()
        with pytest.raises(SessionClosed):
            await step
        assert await swarm.at_rest()


@pytest.mark.parametrize(
    ("setting", "told"), [(False, []), ("inference", ["session through"]), (True, ["route:"])]
)
async def test_routes_are_shown_as_asked(
    setting: object,
    told: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("petals"), "propagate", True)
    caplog.set_level("INFO", logger="petals.client")
    async with toy_swarm((0, 6)) as swarm:
        session = await open_one(swarm.access(6, show_route=setting), ALL)
        await session.close()
        messages = [record.getMessage() for record in caplog.records]
        shown = f"0:6 at …{swarm.servers[0].peer_id[-6:]}"
        assert [message for message in messages if shown in message] == [
            f"{words} {shown}" for words in told
        ]


async def test_a_closed_session_says_so() -> None:
    async with toy_swarm((0, 6)) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        await session.close()
        await session.close()
        with pytest.raises(SessionClosed):
            await session.step(states(3), (0,), (3,))
        assert not swarm.servers[0].opened


async def test_without_a_length_the_server_sets_it() -> None:
    async with toy_swarm((0, 6), max_length=8) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=None)
        await session.step(states(3), (0,), (3,))
        assert session.max_length == 8
        with pytest.raises(LengthExceeded):
            await session.step(states(6), (3,), (6,))
        await session.close()


async def test_the_trace_tells_where_time_went() -> None:
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        await session.step(states(3), (0,), (3,))
        await session.step(states(1), (3,), (1,))
        trace = session.trace
        assert [hop.peer_id for hop in trace.hops] == [s.peer_id for s in swarm.servers]
        assert len(trace.step_seconds) == 2
        hop = trace.hops[0]
        assert [step.num_tokens for step in hop.steps] == [3, 1]
        assert (hop.median_seconds("queue"), hop.median_seconds("compute")) == (0.001, 0.002)
        assert hop.overhead_seconds == pytest.approx(hop.median_seconds() - 0.003)
        await session.close()


async def test_many_sessions_run_in_one_loop() -> None:
    async with toy_swarm(*THREE) as swarm:
        access = swarm.access(6)

        async def one(number: int) -> None:
            session = SessionRows(access, ALL, max_length=20)
            text = states(6, seed=number)
            parts = [await session.step(text[:3], (0,), (3,))]
            for at in range(3, 6):
                parts.append(await session.step(text[at : at + 1], (at,), (1,)))
            torch.testing.assert_close(torch.cat(parts), expected(text, ALL))
            await session.close()

        await asyncio.gather(*(one(number) for number in range(20)))
        assert await swarm.at_rest()


async def test_a_slow_server_is_left_for_a_faster_one() -> None:
    async with toy_swarm(*THREE) as swarm:
        access = swarm.access(6, straggler_look_seconds=0.0)
        session = SessionRows(access, ALL, max_length=20)
        text = states(8)
        slow = swarm.servers[1]
        slow.compute_seconds = 5.0
        await session.step(text[:3], (0,), (3,))
        spare = await swarm.add(2, 4, compute_seconds=5.0)
        view = await access.view()
        await view.refresh()
        await view.measure([spare.peer_id])
        for at in range(3, 8):
            output = await session.step(text[at : at + 1], (at,), (1,))
            torch.testing.assert_close(output, expected(text, ALL)[at : at + 1])
        assert [hop.peer_id for hop in session.trace.hops][1] == spare.peer_id
        assert [len(server.steps) for server in (slow, spare)] == [3, 3]
        assert [len(server.replays) for server in swarm.servers] == [0, 0, 0, 1]
        (repair,) = session.trace.repairs
        assert repair.peer_id == slow.peer_id
        assert "slow" in repair.reason
        swarm.net.kill(spare.peer_id)
        output = await session.step(states(1, 9), (8,), (1,))
        whole = torch.cat([text, states(1, 9)])
        torch.testing.assert_close(output, expected(whole, ALL)[8:])
        assert [hop.peer_id for hop in session.trace.hops][1] == slow.peer_id
        await session.close()


async def test_a_server_that_lives_and_never_answers_is_left_if_another_is_known() -> None:
    async with toy_swarm(*THREE) as swarm:
        access = swarm.access(6, step_timeout=0.02, hung_seconds=0.3)
        session = SessionRows(access, ALL, max_length=20)
        text = states(4)
        await session.step(text[:3], (0,), (3,))
        hung = swarm.servers[1]
        hung.held = asyncio.Event()
        waiting = asyncio.create_task(session.step(text[3:], (3,), (1,)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await asyncio.shield(waiting)
        hung.held.set()  # nobody else has its blocks: there was nothing better than waiting
        torch.testing.assert_close(await waiting, expected(text, ALL)[3:])
        spare = await swarm.add(2, 4)
        view = await access.view()
        await view.refresh()
        await view.measure([spare.peer_id])
        hung.held = asyncio.Event()
        output = await session.step(states(1, 9), (4,), (1,))
        whole = torch.cat([text, states(1, 9)])
        torch.testing.assert_close(output, expected(whole, ALL)[4:])
        (repair,) = session.trace.repairs
        assert repair.peer_id == hung.peer_id and "It lives" in repair.reason
        assert [hop.peer_id for hop in session.trace.hops][1] == spare.peer_id
        hung.held.set()
        await session.close()


@pytest.mark.parametrize("fault", RequestError.__subclasses__(), ids=lambda fault: fault.code)
async def test_what_one_server_refuses_another_runs_and_none_is_banned(
    fault: type[RequestError],
) -> None:
    async with toy_swarm(*THREE, THREE[1]) as swarm:
        access = swarm.access(6, max_retries=0)
        session = SessionRows(access, ALL, max_length=20)
        text = states(4)
        await session.step(text[:2], (0,), (2,))
        one = swarm.server_of(session, 1)
        (other,) = {s for s in swarm.servers if s.blocks == one.blocks and s is not one}
        one.refuse_steps = [fault("This cannot be.") for _ in range(9)]
        output = await session.step(text[2:3], (2,), (1,))
        torch.testing.assert_close(output, expected(text[:3], ALL)[2:])
        assert len(one.refuse_steps) == 8
        assert swarm.server_of(session, 1) is other
        other.refuse_steps = [fault("Neither this.") for _ in range(9)]
        with pytest.raises(fault, match="cannot|Neither") as caught:
            await session.step(text[3:], (3,), (1,))
        assert "says: " in str(caught.value)
        assert sorted((len(one.refuse_steps), len(other.refuse_steps))) == [7, 8]
        view = await access.view()
        assert not view.bans.at(swarm.client.clock.monotonic())
        one.refuse_steps, other.refuse_steps = [], []
        output = await session.step(text[3:], (3,), (1,))
        torch.testing.assert_close(output, expected(text, ALL)[3:])
        await session.close()


async def test_a_reply_that_cannot_be_read_ends_the_hop_and_not_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with toy_swarm(*THREE, *THREE) as swarm:
        session = SessionRows(swarm.access(6), ALL, max_length=20)
        text, failed, take = states(6), [], PendingReply.take

        def fail_once(pending: PendingReply, reply: HopReply) -> None:
            if not failed:
                failed.append(reply)
                raise RuntimeError("a bug of ours")
            take(pending, reply)

        monkeypatch.setattr(PendingReply, "take", fail_once)
        output = await session.step(text, (0,), (6,))
        torch.testing.assert_close(output, expected(text, ALL))
        (repair,) = session.trace.repairs
        assert failed and "could not be read" in repair.reason
        await session.close()


async def test_a_hop_cannot_answer_for_another() -> None:
    """It knows the id of the hop behind it, since it forwards to it; the client here does, too."""
    async with toy_swarm(*THREE) as swarm:
        session = SessionRows(swarm.access(6, request_timeout=2.0), ALL, max_length=20)
        text, (first, second, _) = states(4), swarm.servers
        await session.step(text[:2], (0,), (2,))
        second.held = asyncio.Event()
        step = asyncio.create_task(session.step(text[2:], (2,), (2,)))
        await second.until(lambda: len(second.steps) == 2)
        forged = StepResult(second.steps[-1].header, 0.0, 0.0, 2)
        await first.channels[-1].send(forged, [torch.ones(2, HIDDEN)])
        await first.channels[-1].ping()
        second.held.set()
        torch.testing.assert_close(await step, expected(text, ALL)[2:])
        await session.close()


async def test_a_server_that_reports_losses_and_never_answers_is_replaced() -> None:
    async with toy_swarm(*THREE, THREE[1]) as swarm:
        session = SessionRows(swarm.access(6, request_timeout=1.0), ALL, max_length=20)
        text = states(6)
        await session.step(text[:3], (0,), (3,))
        liar = swarm.server_of(session, 1)
        liar.answer = "losses"
        output = await session.step(text[3:], (3,), (3,))
        torch.testing.assert_close(output, expected(text, ALL)[3:])
        assert len(liar.steps) < 5
        assert [repair.peer_id for repair in session.trace.repairs] == [liar.peer_id]
        await session.close()


async def test_a_server_that_takes_no_data_is_replaced() -> None:
    """It answers pings, and gives no credit for what is more than its window."""
    async with toy_swarm(*THREE, THREE[1], max_length=10**6) as swarm:
        access = swarm.access(6, request_timeout=1.0, prefill_chunk_tokens=10**6)
        session = SessionRows(access, ALL, max_length=10**6)
        text = states(400_000)
        await session.step(text[:3], (0,), (3,))
        deaf = swarm.server_of(session, 1)
        deaf.is_reading.clear()
        await session.step(text[3:4], (3,), (1,))
        output = await session.step(text[4:], (4,), (len(text) - 4,))
        deaf.is_reading.set()
        torch.testing.assert_close(output, expected(text, ALL)[4:], rtol=1e-3, atol=1e-4)
        assert len(deaf.steps) == 2
        (repair,) = session.trace.repairs
        assert repair.peer_id == deaf.peer_id and repair.stall_seconds < 5.0
        await session.close()


async def test_a_slow_server_is_kept_while_the_faster_one_is_full() -> None:
    async with toy_swarm(*THREE) as swarm:
        access = swarm.access(6, max_pinged=3)
        session = SessionRows(access, ALL, max_length=20)
        text = states(8)
        swarm.servers[1].compute_seconds = 5.0
        await session.step(text[:3], (0,), (3,))
        spare = await swarm.add(2, 4, tokens_free=19)
        view = await access.view()
        await view.refresh()
        await view.measure([spare.peer_id])
        for at in range(3, 8):
            await session.step(text[at : at + 1], (at,), (1,))
        assert not session.trace.repairs
        await session.close()


@pytest.mark.parametrize("replay_answer", ["gap", "long", "narrow", "nan"])
async def test_rows_that_cannot_be_refill_nobody(replay_answer: str) -> None:
    """The predecessor of a lost hop sends nonsense: it is banned, and the session goes on."""
    async with toy_swarm(*THREE, *THREE[:2]) as swarm:
        access = swarm.access(6)
        session = SessionRows(access, ALL, max_length=20)
        text = states(6)
        await session.step(text[:4], (0,), (4,))
        first, lost, _ = (hop.peer_id for hop in session.trace.hops)
        liar = swarm.server_of(session, 0)
        liar.replay_answer = replay_answer
        swarm.net.kill(lost)
        for at in range(4, 6):
            output = await session.step(text[at : at + 1], (at,), (1,))
            torch.testing.assert_close(output, expected(text, ALL)[at : at + 1])
        assert {repair.peer_id for repair in session.trace.repairs} == {first, lost}
        assert first in (await access.view()).bans.at(swarm.client.clock.monotonic())
        await session.close()


async def test_spares_are_asked_until_one_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async with toy_swarm(*THREE) as swarm:
        view = await swarm.access(6).view()
        monkeypatch.setattr(view, "_worth_measuring", list)
        spares = [await swarm.add(2, 4, tokens_free=room) for room in (9, 9, 10, 10)]
        for spare, rate in zip(spares, (4000, 3000, 2000, 1000)):
            await spare.announce(inference_rps=rate)
        await view.refresh()
        peer = swarm.servers[1].peer_id
        await view.warm_spares((Hop(peer, BlockSpan(2, 4)),), cache_tokens=10)
        assert [spare.num_asked for spare in spares] == [1, 1, 1, 0]
        needs = Needs(blocks=BlockSpan(2, 4), cache_tokens=10, exclude=frozenset({peer}))
        assert (await view.route(needs))[0].peer_id == spares[2].peer_id
        await view.close()


async def test_a_repair_is_one_line_for_the_user(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("petals"), "propagate", True)
    caplog.set_level("INFO", logger="petals.client.session.supervisor")
    async with toy_swarm(*THREE) as swarm:
        access = swarm.access(6)
        session = SessionRows(access, ALL, max_length=20)
        await session.step(states(3), (0,), (3,))
        spare = await swarm.add(2, 4)
        await (await access.view()).refresh()
        lost = swarm.servers[1].peer_id
        swarm.net.kill(lost)
        await session.step(states(1), (3,), (1,))
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"blocks 2:4 of …{lost[-6:]}")
        assert line.endswith(f"2:4 at …{spare.peer_id[-6:]}")
        await session.close()
