"""A session through several hops gives what the blocks give in one place."""

import asyncio
import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from petals.errors import (
    BadInput,
    BatchTooLarge,
    LengthExceeded,
    PetalsError,
    SessionClosed,
    SessionGap,
)
from petals.server.config import ClientLimits
from petals.wire.requests import KeepSession, OpenSession, Step
from support.models import WIDTH
from support.reference import assert_close, states
from support.server_faults import computing_for
from support.service import split

LogCapture = pytest.LogCaptureFixture
THREE = ((0, 2), (2, 4), (4, 6))


async def test_prefill_and_decode() -> None:
    async with split(*THREE) as swarm:
        session, text = swarm.session(), states(9)
        output = await session.step(text[:6], (0,), (6,))
        assert_close(output, swarm.expected(text)[:6])
        await swarm.decode(session, text, 6)
        assert session.lengths == (9,)
        assert swarm.num_asked(OpenSession) == [1, 1, 1]
        await session.close()
        await swarm.at_rest()


async def test_rolling_back_costs_no_trip() -> None:
    async with split(*THREE) as swarm:
        session, text, other = swarm.session(), states(6), states(3, seed=5)
        await session.step(text, (0,), (6,))
        output = await session.step(other, (2,), (3,))
        assert_close(output, swarm.expected(torch.cat([text[:2], other]))[2:])
        assert swarm.num_asked(Step) == [2, 2, 2]
        with pytest.raises(SessionGap):
            await session.step(other, (6,), (3,))


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
        assert swarm.num_asked(Step)[0] == num_parts


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
        assert swarm.num_asked(Step) == [1]
        await swarm.decode(session, text, 3)


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
