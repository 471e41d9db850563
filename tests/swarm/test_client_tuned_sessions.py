"""Sessions with deep prompts and adapters: each hop gets its blocks' part, also a replacement."""

import pytest
import torch
from torch import Tensor

from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.training.hop_call import PassCall
from petals.errors import BadInput, UnknownAdapter
from petals.models.adapters.low_rank import Adapter
from petals.types import BlockSpan
from petals.wire.passes import PutAdapter
from petals.wire.requests import OpenSession
from support.models import WIDTH, random_adapter
from support.reference import assert_close, states
from support.service import Served, split

ALL = BlockSpan(1, 6)
THREE = ((0, 2), (2, 4), (4, 6))
PROMPTS = torch.randn(5, 3, WIDTH, generator=torch.Generator().manual_seed(3))
TEXT = states(7)


def expected(swarm: Served, adapter: Adapter | None = None) -> Tensor:
    call = PassCall((len(TEXT),), PROMPTS[:, None], adapter)
    return swarm.traced(TEXT, call, ALL)[5]


def tuned(swarm: Served, adapter: Adapter | None = None, prompts: Tensor = PROMPTS) -> SessionRows:
    return swarm.session(blocks=ALL, tuning=Tuning(ALL.start, prompts, adapter))


async def run(session: SessionRows, start: int, end: int) -> Tensor:
    return await session.step(TEXT[start:end], (start,), (end - start,))


async def test_each_hop_gets_the_prompts_of_its_blocks() -> None:
    async with split(*THREE) as swarm:
        session = tuned(swarm)
        parts = [await run(session, 0, 2), await run(session, 2, 5), await run(session, 5, 7)]
        assert_close(torch.cat(parts), expected(swarm))
        openings = [worker.faults.all(OpenSession)[0] for worker in swarm.workers]
        assert [opening.num_prompt_tokens for opening in openings] == [3, 3, 3]
        assert_close(await run(session, 1, 7), expected(swarm)[1:])


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_replacement_is_opened_with_its_share(victim: int) -> None:
    async with split((0, 3), (3, 4), (4, 6)) as swarm:
        adapter = random_adapter((1, 2, 5))
        session = tuned(swarm, adapter)
        first = await run(session, 0, 4)
        for start, end in ((0, 2), (2, 4), (3, 6)):
            await swarm.add(start, end)
        swarm.net.kill(swarm.workers[victim].peer_id)
        rest = await run(session, 4, 7)
        assert_close(torch.cat([first, rest]), expected(swarm, adapter))


async def test_an_adapter_goes_where_its_parts_are() -> None:
    async with split(*THREE) as swarm:
        adapter, connection = random_adapter((2, 5)), swarm.connection()
        tuning = Tuning(ALL.start, PROMPTS, adapter)
        for num_sent in ([0, 1, 1], [0, 1, 1], [0, 2, 1]):
            session = swarm.session(connection, blocks=ALL, tuning=tuning)
            assert_close(await run(session, 0, 7), expected(swarm, adapter))
            assert swarm.num_asked(PutAdapter) == num_sent
            assert swarm.workers[0].faults.all(OpenSession)[0].adapter is None
            if swarm.num_asked(OpenSession)[1] == 2:
                # The server has forgotten it: it is sent again.
                forgotten = UnknownAdapter("No such adapter.")
                swarm.workers[1].faults.refusals[OpenSession] = [forgotten]


async def test_prompts_of_another_width() -> None:
    async with split((0, 6)) as swarm:
        with pytest.raises(BadInput):
            await run(tuned(swarm, prompts=PROMPTS[..., 1:]), 0, 7)
        assert not swarm.workers[0].faults.all(OpenSession)
