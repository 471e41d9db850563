"""Sessions with deep prompts and adapters: each hop gets its blocks' part, also a replacement."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.training.hop_call import PassCall
from petals.errors import BadInput
from petals.types import BlockSpan
from support.fake_server import HIDDEN, ToyAdapter, run_call, states, toy_swarm
from support.reference import assert_close

ALL = BlockSpan(1, 6)
PROMPTS = torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
TEXT = states(7)


def expected(adapter: ToyAdapter | None = None) -> Tensor:
    call = PassCall((len(TEXT),), PROMPTS[:, None], adapter)
    return run_call(TEXT, ALL, call)[5].detach()


@asynccontextmanager
async def tuned(
    access: SwarmConnection, adapter: ToyAdapter | None = None
) -> AsyncIterator[SessionRows]:
    """A session with prompts and an adapter, closed at the end."""
    tuning = Tuning(ALL.start, PROMPTS, adapter)
    session = SessionRows(access, ALL, max_length=20, tuning=tuning)
    try:
        yield session
    finally:
        await session.close()


async def run(session: SessionRows, start: int, end: int) -> Tensor:
    return await session.step(TEXT[start:end], (start,), (end - start,))


async def test_each_hop_gets_the_prompts_of_its_blocks() -> None:
    async with toy_swarm((0, 2), (2, 4), (4, 6)) as swarm, tuned(swarm.access(6)) as session:
        parts = [await run(session, 0, 2), await run(session, 2, 5), await run(session, 5, 7)]
        assert_close(torch.cat(parts), expected())
        assert [server.opened[0].num_prompt_tokens for server in swarm.servers] == [3, 3, 3]
        assert_close(await run(session, 1, 7), expected()[1:])


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_replacement_is_opened_with_its_share(victim: int) -> None:
    async with toy_swarm((0, 3), (3, 4), (4, 6)) as swarm:
        access, adapter = swarm.access(6), ToyAdapter.random((1, 2, 5))
        async with tuned(access, adapter) as session:
            first = await run(session, 0, 4)
            for start, end in ((0, 2), (2, 4), (3, 6)):
                await swarm.add(start, end)
            await (await access.view()).refresh()
            swarm.net.kill(swarm.servers[victim].peer_id)
            rest = await run(session, 4, 7)
            assert_close(torch.cat([first, rest]), expected(adapter))


async def test_an_adapter_goes_where_its_parts_are() -> None:
    async with toy_swarm((0, 2), (2, 4), (4, 6)) as swarm:
        access, adapter = swarm.access(6), ToyAdapter.random((2, 5))
        for num_given in ([0, 1, 1], [0, 1, 1], [0, 2, 1]):
            async with tuned(access, adapter) as session:
                assert_close(await run(session, 0, 7), expected(adapter))
            assert [server.num_given for server in swarm.servers] == num_given
            assert swarm.servers[0].opened[0].adapter is None
            if len(swarm.servers[1].opened) == 2:
                # The server has forgotten it: it is sent again.
                swarm.servers[1].given.clear()


async def test_prompts_of_another_width() -> None:
    async with toy_swarm((0, 6)) as swarm:
        tuning = Tuning(ALL.start, PROMPTS[..., 1:])
        session = SessionRows(swarm.access(6), ALL, max_length=20, tuning=tuning)
        with pytest.raises(BadInput):
            await run(session, 0, 7)
        assert not swarm.servers[0].opened
