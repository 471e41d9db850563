"""A hop that leaves gives its successor its keys and values: the same bits, nothing computed."""

from collections.abc import Sequence

import pytest
import torch

from petals.swarm.failover_config import FailoverConfig
from petals.types import BlockSpan
from petals.wire.handshake import Refusal
from petals.wire.replies import ReplayDone
from petals.wire.requests import Forwarded, ReplayPart
from petals.wire.services import RING_SERVICE
from support.linked_script import (
    HISTORIES,
    PARTS,
    Leg,
    LinkedSession,
    linked,
    linked_servers,
    plain,
)
from support.reference import states
from support.service import Served, Worker


async def successor(session: LinkedSession, *, is_named: bool = True) -> Leg:
    """A hop for the blocks of the one in the middle, which may give it what it keeps."""
    sources = (session.legs[1].worker.peer_id,) if is_named else ()
    return await session.open(session.swarm.workers[3], PARTS[1], 2, sources)


async def give(session: LinkedSession, new: Leg, before_step: int, **held: object) -> None:
    await session.fill(session.legs[1], [new], before_step, kv=True, **held)


async def change(session: LinkedSession, new: Leg, step_id: int) -> None:
    """The successor takes its place."""
    session.legs[1], session.step_id = new, step_id
    await session.begin_epoch()


def kv_of(worker: Worker) -> list[torch.Tensor]:
    return [row.read(0, row.length) for row in worker.session.rows.kv.rows]


def assert_same_bits(one: Worker, other: Worker) -> None:
    for theirs, ours in zip(kv_of(one), kv_of(other), strict=True):
        assert len(ours) and torch.equal(theirs, ours)
    outputs = [worker.session.rows.outputs.whole() for worker in (one, other)]
    assert torch.equal(*[rows.hidden for rows in outputs if rows is not None])


@pytest.mark.parametrize("model", ["llama", "bloom", "deepseek_v3"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
async def test_a_successor_has_the_same_bits_and_computes_nothing(model, history) -> None:
    async with linked_servers(4, model) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await history(session)
        new, rows = await successor(session), (0,) * len(session.rows)
        await give(session, new, 20, base_rows=rows, starts=rows)
        assert new.worker.num_batches == 0
        assert new.worker.session.rows.lengths == session.lengths
        assert_same_bits(session.legs[1].worker, new.worker)
        await change(session, new, 20)
        await session.step([2] * len(session.rows))
        await session.step([1] * len(session.rows), [length - 1 for length in session.lengths])


async def test_it_goes_on_where_it_ended() -> None:
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await plain(session)
        new = await successor(session)
        await give(session, new, 10)
        session.step_id = 10
        await session.step([1, 1], [12, 9], (1, 0))
        await session.step([2, 1], [11, 10])
        await give(session, new, 20, base_rows=(1, 0), starts=(11, 9))
        assert new.worker.num_batches == 0
        assert_same_bits(session.legs[1].worker, new.worker)
        await change(session, new, 20)
        await session.step([1, 1])


@pytest.mark.parametrize(
    ("counts", "starts", "reorder", "is_spoilt"),
    [
        ((1, 1), (30, 30), None, False),
        ((1, 1), (29, 30), None, True),
        ((1, 1), (30, 30), (1, 0), True),
    ],
    ids=["grows", "is cut", "is reordered"],
)
async def test_steps_go_on_while_keys_and_values_are_read(
    counts, starts, reorder, is_spoilt
) -> None:
    # One token in a part: the step's batch comes in between.
    async with linked_servers(4, failover=FailoverConfig(kv_part_bytes=1)) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await session.step([30, 30])
        old, new = session.legs[1], await successor(session)
        lengths, request = session.lengths, session.replay(old, [new], 10, kv=True)
        await old.channel.send(request)
        rows = new.worker.session.rows
        await new.worker.until(lambda: rows.lengths[0] > 0)
        assert rows.lengths != lengths
        session.step_id = 10
        await session.step(counts, starts, reorder)
        if is_spoilt:
            answer, _ = await old.hear()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.header) == ("session_gap", request.header)
        else:
            await session.filled(new, request)
            assert rows.lengths == lengths
        await session.step([1, 1])


async def test_outputs_that_were_dropped_are_not_made_up() -> None:
    async with linked_servers(4, log_bytes=30 * states(1).nbytes) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await plain(session)
        old, new = session.legs[1], await successor(session)
        rows = old.worker.session.rows
        other = LinkedSession(swarm, swarm.client, rows=[states(0)])
        await other.add(old.worker, (10, 14))
        await other.step([15])
        assert rows.outputs.is_dropped
        await give(session, new, 10)
        assert new.worker.session.rows.lengths == session.lengths
        await change(session, new, 10)
        await session.step([1, 1])
        assert new.worker.session.rows.outputs.is_dropped


async def test_only_whom_the_client_has_named_gives_keys_and_values() -> None:
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await plain(session)
        old, new = session.legs[1].worker, await successor(session, is_named=False)
        await session.legs[1].channel.send(session.replay(session.legs[1], [new], 10, kv=True))
        await old.until(lambda: old.session.is_idle)
        await new.channel.ping()
        await new.worker.check()
        assert new.worker.session.rows.lengths == (0, 0)


def kv_for(worker: Worker, num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, worker.pool.layout.kv_width(BlockSpan(*PARTS[1])))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kv, outputs: (kv[:, 1:], outputs),
        lambda kv, outputs: (kv[1:], outputs),
        lambda kv, outputs: (kv.half(), outputs),
        lambda kv, outputs: (kv, outputs[:, 1:]),
        lambda kv, outputs: (kv, outputs.half()),
        lambda kv, outputs: (kv, outputs, outputs),
        lambda kv, outputs: (),
        lambda kv, outputs: (kv / 0, outputs),
        lambda kv, outputs: (kv, outputs / 0),
    ],
    ids=[
        "width",
        "count",
        "dtype",
        "outputs",
        "their dtype",
        "too many",
        "none",
        "NaN",
        "infinity",
    ],
)
async def test_keys_and_values_that_cannot_be_right_are_refused(spoil) -> None:
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        new = await successor(session)
        header = new.header(10)
        part = ReplayPart(header, 0, 1, (0, 0), (3, 2), (0, 0), ends=True, kv=True)
        await say(swarm, new, part, spoil(kv_for(new.worker, 5), states(5)))
        answer, _ = await new.hear()
        assert isinstance(answer, Refusal), answer
        assert (answer.code, answer.header) == ("bad_input", header) and answer.hint
        assert new.worker.session.rows.lengths == (0, 0)
        # Nothing is broken by it.
        await say(swarm, new, part, (kv_for(new.worker, 5), states(5)))
        assert (await new.hear())[0] == ReplayDone(header)
        assert new.worker.session.rows.lengths == (3, 2)


async def say(swarm: Served, new: Leg, part: ReplayPart, tensors: Sequence[torch.Tensor]) -> None:
    """As the one in the middle would."""
    channel = await swarm.workers[1].node.open_channel(new.worker.peer_id, RING_SERVICE)
    await channel.send(Forwarded(swarm.client.peer_id, part), tensors)


async def test_recurrent_blocks_give_none() -> None:
    async with linked_servers(4, "qwen3_next") as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await plain(session)
        old, new = session.legs[1], await successor(session)
        assert (await old.refused(session.replay(old, [new], 10, kv=True))).code == "bad_input"
