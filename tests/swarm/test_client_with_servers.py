"""Client and servers, both real, over a network in memory: the numbers are the whole model's."""

import asyncio
from pathlib import Path

import pytest
import torch

from petals.client.training.batch import Pass
from petals.client.training.hop_call import PassCall
from petals.errors import (
    CacheFull,
    LengthExceeded,
    PetalsError,
    RequestTooLarge,
    UnknownAdapter,
)
from petals.types import BlockSpan
from support.reference import assert_close, states
from support.swarm import ALL, RealSwarm, real_swarm


async def test_the_whole_model_by_three_overlapping_servers(bloom: Path) -> None:
    spans = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
    one, two, new = states(40, seed=1), states(33, seed=2), states(3, seed=3)
    async with real_swarm(bloom, *spans) as swarm, swarm.session(max_length=60) as session:
        parts = [await session.step(torch.cat([one[:38], two[:30]]), (0, 0), (38, 30))]
        row_one, row_two = [parts[0][:38]], [parts[0][38:]]
        for at in range(2):
            step = torch.cat([one[38 + at : 39 + at], two[30 + at : 31 + at]])
            output = await session.step(step, (38 + at, 30 + at), (1, 1))
            row_one.append(output[:1])
            row_two.append(output[1:])
        assert_close(torch.cat(row_one), swarm.expected(one))
        assert_close(torch.cat(row_two), swarm.expected(two[:32]))
        output = await session.step(new, (32, 10, 40), (1, 1, 1), reorder=(1, 0, 0))
        for number, row in enumerate([two[:32], one[:10], one]):
            whole = swarm.expected(torch.cat([row, new[number : number + 1]]))
            assert_close(output[number : number + 1], whole[len(row) :])
        assert len(session.trace.hops) >= 3


async def test_whole_rows_at_once(bloom: Path) -> None:
    async with real_swarm(bloom, BlockSpan(0, 2), BlockSpan(1, 5)) as swarm:
        rows = states(9, seed=1), states(7, seed=2)
        passed = Pass(swarm.connection(), ALL, PassCall((9, 7)), is_training=False)
        output = (await passed.forward(torch.cat(rows))).hidden
        assert_close(output, torch.cat([swarm.expected(row) for row in rows]))


async def first_step(swarm: RealSwarm, max_length: int, rows: int = 1, **options: object) -> None:
    async with swarm.session(max_length=max_length, **options) as session:
        await session.step(states(rows), (0,) * rows, (1,) * rows)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (LengthExceeded, {"max_length": 65}),
        (RequestTooLarge, {"max_length": 64, "rows": 2}),
        (UnknownAdapter, {"max_length": 16, "active_adapter": "poems"}),
    ],
)
async def test_what_servers_cannot_give(
    bloom: Path, error: type[PetalsError], asked: dict[str, object]
) -> None:
    async with real_swarm(bloom, BlockSpan(0, 3), BlockSpan(3, 5), cache_tokens=64) as swarm:
        with pytest.raises(error):
            await first_step(swarm, **asked)


async def test_a_full_cache_has_room_again_when_its_session_ends(bloom: Path) -> None:
    async with real_swarm(bloom, BlockSpan(0, 3), BlockSpan(3, 5), cache_tokens=64) as swarm:
        async with swarm.session(max_length=64) as holder:
            await holder.step(states(1), (0,), (1,))
            with pytest.raises(CacheFull):
                await first_step(swarm, 16, alloc_timeout=0.05)
        await first_step(swarm, 64, alloc_timeout=0.05)


async def test_clients_take_turns_in_small_pools(bloom: Path) -> None:
    async with real_swarm(bloom, BlockSpan(0, 3), BlockSpan(2, 5), cache_tokens=32) as swarm:

        async def client(number: int) -> None:
            text = states(8, seed=number)
            async with swarm.session(max_length=32, alloc_timeout=60.0) as session:
                output = await session.step(text, (0,), (8,))
            assert_close(output, swarm.expected(text))

        await asyncio.gather(*(client(number) for number in range(5)))
