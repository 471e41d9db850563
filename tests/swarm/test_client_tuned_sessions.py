"""Sessions with deep prompts and adapters: each hop gets its blocks' part, also a replacement."""

import pytest
import torch
from torch import Tensor

from petals.client.block_runner import PassCall
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.errors import BadInput
from petals.types import BlockSpan
from support.fake_server import HIDDEN, ToyAdapter, ToySwarm, run_call, states, toy_swarm

ALL = BlockSpan(1, 6)
PROMPTS = torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
TEXT = states(7)


def expected(adapter: ToyAdapter | None = None) -> Tensor:
    call = PassCall((len(TEXT),), PROMPTS[:, None], adapter)
    return run_call(TEXT, ALL, call)[5].detach()


def open_tuned(
    swarm: ToySwarm, adapter: ToyAdapter | None = None, access: SwarmConnection | None = None
) -> SessionRows:
    tuning = Tuning(ALL.start, PROMPTS, adapter)
    return SessionRows(access or swarm.access(6), ALL, max_length=20, tuning=tuning)


async def run(session: SessionRows, start: int, end: int) -> Tensor:
    return await session.step(TEXT[start:end], (start,), (end - start,))


async def test_each_hop_gets_the_prompts_of_its_blocks() -> None:
    async with toy_swarm((0, 2), (2, 4), (4, 6)) as swarm:
        session = open_tuned(swarm)
        parts = [await run(session, 0, 2), await run(session, 2, 5), await run(session, 5, 7)]
        torch.testing.assert_close(torch.cat(parts), expected())
        assert [server.opened[0].num_prompt_tokens for server in swarm.servers] == [3, 3, 3]
        session.rewind(1)
        torch.testing.assert_close(await run(session, 1, 7), expected()[1:])
        await session.close()


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_replacement_is_opened_with_its_share(victim: int) -> None:
    async with toy_swarm((0, 3), (3, 4), (4, 6)) as swarm:
        adapter = ToyAdapter.random((1, 2, 5))
        access = swarm.access(6)
        session = open_tuned(swarm, adapter, access)
        first = await run(session, 0, 4)
        for start, end in ((0, 2), (2, 4), (3, 6)):
            await swarm.add(start, end)
        await (await access.view()).refresh()
        swarm.net.kill(swarm.servers[victim].peer_id)
        rest = await run(session, 4, 7)
        torch.testing.assert_close(torch.cat([first, rest]), expected(adapter))
        await session.close()


async def test_an_adapter_goes_where_its_parts_are() -> None:
    async with toy_swarm((0, 2), (2, 4), (4, 6)) as swarm:
        adapter, access = ToyAdapter.random((2, 5)), swarm.access(6)
        for _ in range(2):
            session = open_tuned(swarm, adapter, access)
            torch.testing.assert_close(await run(session, 0, 7), expected(adapter))
            await session.close()
        assert [server.num_given for server in swarm.servers] == [0, 1, 1]
        assert swarm.servers[0].opened[0].adapter is None
        swarm.servers[1].given.clear()
        session = open_tuned(swarm, adapter, access)
        torch.testing.assert_close(await run(session, 0, 7), expected(adapter))
        assert [server.num_given for server in swarm.servers] == [0, 2, 1]
        await session.close()


async def test_prompts_of_another_width() -> None:
    async with toy_swarm((0, 6)) as swarm:
        tuning = Tuning(ALL.start, PROMPTS[..., 1:])
        session = SessionRows(swarm.access(6), ALL, max_length=20, tuning=tuning)
        with pytest.raises(BadInput):
            await run(session, 0, 7)
        assert not swarm.servers[0].opened
