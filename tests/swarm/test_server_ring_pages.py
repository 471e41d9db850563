"""A hop that leaves gives its successor what its blocks keep: the same bits, nothing computed."""

import asyncio

import pytest
import torch

from petals.swarm.config import MIB
from petals.types import BlockSpan
from petals.wire.handshake import Refusal
from petals.wire.replies import ReplayDone
from petals.wire.requests import Forwarded, ReplayRequest, Step
from petals.wire.services import RING_SERVICE
from support.linked_script import HISTORIES, PARTS, Told, plain, ring_for
from support.linked_services import Leg, RingOfServers, Worker, ring_of_servers
from support.service import states


async def successor(told: Told) -> Leg:
    """A hop for the blocks of the one in the middle, which may give it what it keeps."""
    middle = told.ring.legs[1].worker
    return await told.ring.open(told.ring.swarm.workers[3], PARTS[1], 2, (middle.peer_id,))


async def ask(told: Told, new: Leg, step_id: int, **held: object) -> None:
    ring = told.ring
    hops = (new.next_hop,)
    message = ReplayRequest(ring.session_id, 0, step_id, told.lengths, hops, **held, pages=True)
    await ring.legs[1].channel.send(message)


async def give(told: Told, new: Leg, step_id: int, **held: object) -> None:
    await ask(told, new, step_id, **held)
    await told.ring.replayed(new)


async def change(told: Told, new: Leg, step_id: int) -> None:
    """The successor takes its place."""
    ring = told.ring
    ring.legs[1], ring.epoch, told.step_id = new, 1, step_id
    await ring.announce(*ring.legs)


def pages_of(worker: Worker) -> list[torch.Tensor]:
    return [row.read(0, row.length) for row in worker.session.kv.rows]


def put_out(worker: Worker) -> torch.Tensor:
    rows = worker.session.outbox.rows()
    return torch.cat([chunk for row in rows._rows for chunk in row])


@pytest.mark.parametrize("model", ["llama", "bloom", "deepseek_v3"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
async def test_a_successor_has_the_same_bits_and_computes_nothing(model, history) -> None:
    async with ring_of_servers(4, model) as swarm:
        told = await ring_for(swarm, rows=2)
        await history(told)
        old, new = told.ring.legs[1], await successor(told)
        rows = (0,) * len(told.rows)
        await give(told, new, 20, onto=rows, starts=rows)
        assert new.worker.num_batches == 0
        assert new.worker.session.lengths == told.lengths
        for theirs, ours in zip(pages_of(old.worker), pages_of(new.worker), strict=True):
            assert len(ours) and torch.equal(theirs, ours)
        assert torch.equal(put_out(old.worker), put_out(new.worker))
        await change(told, new, 20)
        await told.step([2] * len(told.rows))
        await told.step([1] * len(told.rows), [length - 1 for length in told.lengths])
        for leg in told.ring.legs:
            leg.worker.pool.check_integrity()


async def test_pages_go_on_where_earlier_ones_ended() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await plain(told)
        new = await successor(told)
        await give(told, new, 10)
        told.step_id = 10
        await told.step([1, 1], [12, 9], (1, 0))
        await told.step([2, 1], [11, 10])
        await give(told, new, 20, onto=(1, 0), starts=(11, 9))
        assert new.worker.num_batches == 0
        for theirs, ours in zip(pages_of(told.ring.legs[1].worker), pages_of(new.worker)):
            assert torch.equal(theirs, ours)
        await change(told, new, 20)
        await told.step([1, 1])


@pytest.mark.parametrize(
    ("counts", "starts", "reorder", "is_spoilt"),
    [
        ((1, 1), (30, 30), None, False),
        ((1, 1), (29, 30), None, True),
        ((1, 1), (30, 30), (1, 0), True),
    ],
    ids=["grows", "is cut", "is reordered"],
)
async def test_steps_go_on_while_pages_are_read(counts, starts, reorder, is_spoilt) -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([30, 30])
        old, new = told.ring.legs[1], await successor(told)
        session, lengths = old.worker.session, told.lengths
        executor, call = old.worker.service.executor, old.worker.service.executor.call
        read, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(function):
            """What is read after the first pages waits for the step."""
            if read.is_set():
                await go_on.wait()
            read.set()
            return await call(function)

        executor.call = slowly
        await ask(told, new, 10)
        await read.wait()
        told.step_id = 10
        await told.step(counts, starts, reorder)
        go_on.set()
        if is_spoilt:
            answer, _ = await old.hear()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.step_id) == ("session_gap", 10)
        else:
            await told.ring.replayed(new)
            assert new.worker.session.lengths == lengths
        assert not session.closed
        await told.step([1, 1])


async def test_what_was_put_out_and_dropped_is_not_made_up() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await plain(told)
        old, new = told.ring.legs[1], await successor(told)
        old.worker.session.outbox.drop()
        await give(told, new, 10)
        assert new.worker.session.lengths == told.lengths
        assert new.worker.session.outbox.is_lost
        await change(told, new, 10)
        await told.step([1, 1])
        assert new.worker.session.outbox.is_lost


async def test_only_whom_the_client_has_named_gives_pages() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await plain(told)
        ring = told.ring
        new = await ring.open(swarm.workers[3], PARTS[1], 2)
        await ask(told, new, 10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await new.hear()
        assert new.worker.session.lengths == (0, 0)


def pages_for(worker: Worker, num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, worker.pool.layout.kv_width(BlockSpan(*PARTS[1])))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pages, outputs: (pages[:, 1:], outputs),
        lambda pages, outputs: (pages[1:], outputs),
        lambda pages, outputs: (pages.half(), outputs),
        lambda pages, outputs: (pages, outputs[:, 1:]),
        lambda pages, outputs: (pages, outputs.half()),
        lambda pages, outputs: (pages, outputs, outputs),
        lambda pages, outputs: (),
        lambda pages, outputs: (pages / 0, outputs),
        lambda pages, outputs: (pages, outputs / 0),
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
async def test_pages_that_cannot_be_right_are_refused(spoil) -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        new = await successor(told)
        tensors = spoil(pages_for(new.worker, 5), states(5))
        step = Step(told.ring.session_id, 0, 1, (0, 0), (3, 2), replay=True, ends=True, pages=True)
        await say(swarm, new, step, tensors)
        answer, _ = await new.hear()
        assert isinstance(answer, Refusal), answer
        assert answer.code == "bad_input" and answer.hint
        assert new.worker.session.lengths == (0, 0)
        # Nothing is broken by it.
        await say(swarm, new, step, (pages_for(new.worker, 5), states(5)))
        assert (await new.hear())[0] == ReplayDone(told.ring.session_id, 0)
        assert new.worker.session.lengths == (3, 2)
        new.worker.pool.check_integrity()


async def say(swarm: RingOfServers, new: Leg, step: Step, tensors) -> None:
    """As the one in the middle would."""
    channel = await swarm.workers[1].node.open_channel(new.worker.peer_id, RING_SERVICE)
    await channel.send(Forwarded(swarm.client.peer_id, PARTS[1], step), tensors)


async def test_recurrent_blocks_give_no_pages() -> None:
    async with ring_of_servers(4, "qwen3_next") as swarm:
        told = await ring_for(swarm, rows=2)
        await plain(told)
        new = await successor(told)
        await ask(told, new, 10)
        answer, _ = await told.ring.legs[1].hear()
        assert isinstance(answer, Refusal) and answer.code == "bad_input"


async def test_long_rows_are_read_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ring_of_servers(4, outbox_bytes=16 * MIB) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([50, 40])
        new = await successor(told)
        sizes, old = [], told.ring.legs[1].worker
        read = old.session.read

        async def measured(*args):
            pages = await read(*args)
            sizes.append(len(pages))
            return pages

        monkeypatch.setattr(
            "petals.server.network.forwarding._MAX_PAGE_BYTES", 3 * pages_for(old, 1).nbytes
        )
        monkeypatch.setattr(old.session, "read", measured)
        await give(told, new, 10)
        assert sizes == [3] * 30
        for theirs, ours in zip(pages_of(old), pages_of(new.worker)):
            assert torch.equal(theirs, ours)
