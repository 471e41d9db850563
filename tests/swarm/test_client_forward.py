"""Whole sequences through the swarm, split over routes and repaired where a server fails."""

import pytest
import torch

from petals.client.forward import MICRO_BATCH_TOKENS, micro_batches, run_rows
from petals.errors import BatchTooLarge, MissingBlocksError, PeerFailed, PeerMisbehaved
from petals.types import BlockSpan
from toy_blocks import expected, states, toy_swarm

ALL = BlockSpan(0, 4)


async def test_rows_come_back_in_order() -> None:
    async with toy_swarm((0, 2), (2, 4), (1, 4)) as swarm:
        rows = [states(n, seed=n) for n in (3, 700, 5, 600, 0, 1)]
        counts = tuple(len(row) for row in rows)
        output = await run_rows(swarm.access(4), ALL, torch.cat(rows), counts)
        wanted = torch.cat([expected(row, ALL) for row in rows])
        torch.testing.assert_close(output, wanted)
        assert len(swarm.servers[0].forwards) == 2


async def test_part_of_the_blocks() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        part, text = BlockSpan(1, 3), states(4)
        output = await run_rows(swarm.access(4), part, text, (4,))
        torch.testing.assert_close(output, expected(text, part))


async def test_a_failure_in_the_middle_is_mended_from_there() -> None:
    async with toy_swarm((0, 2), (2, 4), (2, 4)) as swarm:
        first, *last = swarm.servers
        for server in last:
            server.refuse_steps.append(PeerFailed("Broken."))
        text = states(4)
        output = await run_rows(swarm.access(4), ALL, text, (4,))
        torch.testing.assert_close(output, expected(text, ALL))
        assert len(first.forwards) == 1


async def test_retries_end() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].refuse_steps += [PeerFailed("Broken.")] * 10
        with pytest.raises(PeerFailed):
            await run_rows(swarm.access(4, max_retries=2), ALL, states(4), (4,))
        assert len(swarm.servers[0].forwards) == 3


async def test_a_refusal_by_all_is_said() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        for server in swarm.servers:
            server.refuse_steps.append(BatchTooLarge("Too much."))
        with pytest.raises(BatchTooLarge):
            await run_rows(swarm.access(4), ALL, states(4), (4,))
        assert [len(server.forwards) for server in swarm.servers] == [1, 1]


async def test_a_wrong_answer_is_not_taken() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].answer = "narrow"
        with pytest.raises(PeerMisbehaved):
            await run_rows(swarm.access(4, max_retries=0), ALL, states(4), (4,))


async def test_nobody_there() -> None:
    async with toy_swarm((0, 3)) as swarm:
        with pytest.raises(MissingBlocksError, match="3:4"):
            await run_rows(swarm.access(4), ALL, states(4), (4,))


async def test_channels_are_used_again() -> None:
    async with toy_swarm((0, 4)) as swarm:
        access = swarm.access(4, max_pinged=0)
        for _ in range(3):
            await run_rows(access, ALL, states(4), (4,))
        view = await access.view()
        channels = view.channels._idle[swarm.servers[0].peer_id, "blocks"]
        assert len(channels) == 1
        await access.close()
        assert channels[0].is_closed


def test_micro_batches_hold_whole_rows() -> None:
    assert list(micro_batches((3, 3, 3, 9, 1), 6)) == [(3, 3), (3,), (9,), (1,)]
    assert list(micro_batches((), 6)) == []
    assert list(micro_batches((0,) * 300, 6)) == [(0,) * 128, (0,) * 128, (0,) * 44]
    assert MICRO_BATCH_TOKENS == 1024
