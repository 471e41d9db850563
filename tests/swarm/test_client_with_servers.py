"""Client and servers, both real, over a network in memory: the numbers are the whole model's."""

from pathlib import Path

import pytest
import torch

from petals.errors import (
    LengthExceeded,
    PetalsError,
    RequestTooLarge,
    UnknownAdapter,
)
from petals.types import BlockSpan
from support.reference import assert_close, states
from support.swarm import RealSwarm, real_swarm


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
