"""Client and servers, both real, over a network in memory: the numbers are the whole model's."""

import asyncio
from pathlib import Path

import pytest
import torch

from petals.client.block_runner import PassCall
from petals.client.session.rows import SessionRows
from petals.client.training.batch import Pass
from petals.errors import CacheFull, LengthExceeded, RequestTooLarge, UnknownAdapter
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.service import assert_close
from support.swarm import ALL, real_swarm, states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


async def test_the_whole_model_by_three_overlapping_servers(folder: Path) -> None:
    spans = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
    async with real_swarm(folder, *spans) as swarm:
        access = swarm.access()
        session = SessionRows(access, ALL, max_length=60)
        one, two = states(40, seed=1), states(33, seed=2)
        parts = [await session.step(torch.cat([one[:38], two[:30]]), (0, 0), (38, 30))]
        row_one, row_two = [parts[0][:38]], [parts[0][38:]]
        for at in range(2):
            step = torch.cat([one[38 + at : 39 + at], two[30 + at : 31 + at]])
            output = await session.step(step, (38 + at, 30 + at), (1, 1))
            row_one.append(output[:1])
            row_two.append(output[1:])
        assert_close(torch.cat(row_one), swarm.expected(one))
        assert_close(torch.cat(row_two), swarm.expected(two[:32]))
        new = states(3, seed=3)
        output = await session.step(new, (32, 10, 40), (1, 1, 1), reorder=(1, 0, 0))
        kept = [two[:32], one[:10], one]
        for number, row in enumerate(kept):
            whole = swarm.expected(torch.cat([row, new[number : number + 1]]))
            assert_close(output[number : number + 1], whole[len(row) :])
        assert len(session.trace.hops) >= 3
        await session.close()
        rows = torch.cat([one[:9], two[:7]])
        whole_rows = Pass(access, ALL, PassCall((9, 7)), is_training=False)
        output = (await whole_rows.forward(rows)).hidden
        assert_close(output[:9], swarm.expected(one[:9]))
        assert_close(output[9:], swarm.expected(two[:7]))
        await access.close()


async def test_refusals(folder: Path) -> None:
    async with real_swarm(folder, BlockSpan(0, 3), BlockSpan(3, 5), cache_tokens=64) as swarm:
        access = swarm.access(alloc_timeout=0.05)

        async def first_step(max_length: int, rows: int = 1) -> SessionRows:
            session = SessionRows(access, ALL, max_length=max_length)
            try:
                await session.step(states(rows), (0,) * rows, (1,) * rows)
            except BaseException:
                await session.close()
                raise
            return session

        with pytest.raises(LengthExceeded):
            await first_step(65)
        with pytest.raises(RequestTooLarge):
            await first_step(64, rows=2)
        holder = await first_step(64)
        with pytest.raises(CacheFull):
            await first_step(16)
        await holder.close()
        await (await first_step(64)).close()
        access = swarm.access(active_adapter="poems")
        with pytest.raises(UnknownAdapter):
            await first_step(16)


async def test_clients_take_turns_in_small_pools(folder: Path) -> None:
    async with real_swarm(folder, BlockSpan(0, 3), BlockSpan(2, 5), cache_tokens=32) as swarm:
        access = swarm.access(alloc_timeout=60.0)

        async def client(number: int) -> None:
            text = states(8, seed=number)
            session = SessionRows(access, ALL, max_length=32)
            output = await session.step(text, (0,), (8,))
            await session.close()
            assert_close(output, swarm.expected(text))

        await asyncio.gather(*(client(number) for number in range(5)))
