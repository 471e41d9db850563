"""A hop that takes over is fed from its predecessor's outbox and goes on with the same numbers."""

import asyncio
from collections.abc import Sequence

import pytest
import torch

from petals.wire.handshake import Refusal
from petals.wire.replies import ReplayDone, StepResult
from petals.wire.requests import ReplayRequest, Step
from petals.wire.services import RING_SERVICE
from support.linked_script import HISTORIES, PARTS, ring_for
from support.linked_services import Leg, StepForwarder, Worker, ring_of_servers
from support.service import assert_close, states


async def replace(
    ring: StepForwarder, failed: slice, workers: Sequence[Worker], rows: int = 1
) -> list[Leg]:
    """The legs ``failed`` die; ``workers`` get their blocks, one each; a new epoch begins."""
    ring.epoch += 1
    lost = ring.legs[failed]
    for leg in lost:
        ring.swarm.net.kill(leg.worker.peer_id)
    start, end = lost[0].blocks[0], lost[-1].blocks[1]
    cuts = [start, *range(start + 1, start + len(workers)), end]
    sources = (ring.legs[failed.start - 1].worker.peer_id,)
    new = []
    for worker, blocks in zip(workers, zip(cuts, cuts[1:])):
        new.append(await ring.open(worker, blocks, rows, sources))
        sources = (worker.peer_id,)
    ring.legs[failed] = new
    await ring.announce(*[leg for leg in ring.legs if leg not in new])
    return new


async def refill(
    ring: StepForwarder,
    new: Sequence[Leg],
    lengths: Sequence[int],
    step_id: int,
    reorder: tuple[int, ...] | None = None,
) -> None:
    """Have the predecessor of ``new`` replay what it has put out before ``step_id``."""
    before = ring.legs[ring.legs.index(new[0]) - 1]
    hops = tuple(leg.next_hop for leg in new)
    message = ReplayRequest(ring.session_id, ring.epoch, step_id, tuple(lengths), hops, reorder)
    await before.channel.send(message)
    await ring.replayed(new[-1])


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
@pytest.mark.parametrize("num_new", [1, 2])
async def test_a_successor_goes_on_with_the_same_numbers(model, history, num_new) -> None:
    async with ring_of_servers(5, model) as swarm:
        told = await ring_for(swarm, rows=2)
        await history(told)
        new = await replace(told.ring, slice(1, 2), swarm.workers[3 : 3 + num_new], rows=2)
        # Enough in one go for any history: the pending step comes after it.
        await refill(told.ring, new, told.lengths, told.step_id + 1)
        assert {leg.worker.session.lengths for leg in new} == {told.lengths}
        assert {leg.worker.session.outbox.lengths for leg in new} == {told.lengths}
        await told.step([2] * len(told.rows))
        await told.step([1] * len(told.rows), [length - 1 for length in told.lengths])
        for leg in told.ring.legs:
            leg.worker.pool.check_integrity()


async def test_a_dead_tail_and_two_neighbours_at_once_are_replaced() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([11])
        new = await replace(told.ring, slice(1, 3), swarm.workers[3:])
        assert new[0].blocks == (11, 14)
        await refill(told.ring, new, told.lengths, told.step_id + 1)
        await told.step([1])


async def test_a_replay_goes_on_where_one_ended() -> None:
    """Steps go on through the old hop meanwhile: one token, a reorder, a rollback."""
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([9, 12])
        ring, head = told.ring, told.ring.legs[0]
        new = await ring.open(swarm.workers[3], PARTS[1], 2, (head.worker.peer_id,))
        copy = ReplayRequest(ring.session_id, 0, 10, told.lengths, (new.next_hop,))
        await head.channel.send(copy)
        await ring.replayed(new)
        told.step_id = 10
        await told.step([1, 1], [12, 9], (1, 0))
        await told.step([2, 1], [11, 10])
        held = {"onto": (1, 0), "starts": (11, 9)}
        rest = ReplayRequest(ring.session_id, 0, 20, told.lengths, (new.next_hop,), **held)
        await head.channel.send(rest)
        await ring.replayed(new)
        assert new.worker.session.lengths == told.lengths
        ring.legs[1], ring.epoch, told.step_id = new, 1, 20
        await ring.announce(*ring.legs)
        await told.step([1, 1])


async def test_rows_that_were_reordered_since_are_not_replayed() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([9, 12])
        ring, head = told.ring, told.ring.legs[0]
        new = await ring.open(swarm.workers[3], PARTS[1], 2, (head.worker.peer_id,))
        told.step_id = 10
        await told.step([1, 1], [12, 9], (1, 0))
        late = ReplayRequest(ring.session_id, 0, 10, (9, 12), (new.next_hop,))
        await head.channel.send(late)
        answer, _ = await head.hear()
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.step_id) == ("session_gap", 10)


async def test_nothing_to_replay_is_soon_done() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        new = await replace(told.ring, slice(1, 2), swarm.workers[3:], rows=2)
        await refill(told.ring, new, (0, 0), 0)
        await told.step([3, 4])


class TestPendingStep:
    """The predecessor has done the step that the successor is yet to do."""

    @pytest.mark.parametrize(
        ("starts", "counts", "reorder"),
        [
            ((9, 12), (1, 2), None),
            ((3, 12), (2, 1), None),
            ((12, 9), (1, 1), (1, 0)),
            ((12, 8, 12), (1, 2, 1), (1, 0, 1)),
            ((4,), (3,), (1,)),
        ],
    )
    async def test_it_is_repeated_from_the_first_hop(self, starts, counts, reorder) -> None:
        async with ring_of_servers(5) as swarm:
            told = await ring_for(swarm, rows=2)
            await told.step([9, 12])
            lengths, ring = told.lengths, told.ring
            pending = torch.cat(told.take(counts, starts, reorder))
            swarm.net.kill(swarm.workers[1].peer_id)
            head = ring.legs[0]
            await head.channel.send(ring.message(told.step_id, starts, counts, reorder), (pending,))
            answer, _ = await head.hear()
            assert isinstance(answer, StepResult) and len(answer.undelivered) == 2
            batches = head.worker.num_batches
            # The second successor dies as well, before it has done the step.
            for workers in (swarm.workers[3:4], swarm.workers[4:]):
                new = await replace(ring, slice(1, 2), workers, rows=2)
                await refill(ring, new, lengths, told.step_id, reorder)
            message = ring.message(told.step_id, starts, counts, reorder)
            await head.channel.send(message, (pending,))
            told.check(starts, (await ring.result(told.step_id)).split(counts))
            assert head.worker.num_batches == batches
            await told.step([1] * len(told.rows))

    async def test_a_successor_replays_to_its_own_successor(self) -> None:
        """Its rows are reordered already, though it has not done the step that does so."""
        async with ring_of_servers(5) as swarm:
            told = await ring_for(swarm, rows=2)
            await told.step([9, 12])
            lengths, ring, reorder = told.lengths, told.ring, (1, 1)
            pending = torch.cat(told.take((1, 1), (12, 6), reorder))
            swarm.net.kill(swarm.workers[1].peer_id)
            head = ring.legs[0]
            first = ring.message(told.step_id, (12, 6), (1, 1), reorder)
            await head.channel.send(first, (pending,))
            await head.hear()
            new = await replace(ring, slice(1, 2), swarm.workers[3:4], rows=2)
            await refill(ring, new, lengths, told.step_id, reorder)
            new = await replace(ring, slice(2, 3), swarm.workers[4:], rows=2)
            await refill(ring, new, lengths, told.step_id, reorder)
            message = ring.message(told.step_id, (12, 6), (1, 1), reorder)
            await head.channel.send(message, (pending,))
            told.check((12, 6), (await ring.result(told.step_id)).split((1, 1)))
            await told.step([2, 2])

    async def test_pieces_of_a_prompt_are_repeated_from_the_first_that_is_missing(self) -> None:
        async with ring_of_servers(4) as swarm:
            ring, text = await swarm.ring(*PARTS), states(20)
            head = ring.legs[0]
            (output,) = await ring.step(0, [0], [text[:5]])
            swarm.net.kill(swarm.workers[1].peer_id)
            for i in (1, 2, 3):
                message = ring.message(i, [5 * i], [5])
                await head.channel.send(message, (text[5 * i : 5 * i + 5],))
            for _ in range(3):
                await head.hear()
            batches = head.worker.num_batches
            new = await replace(ring, slice(1, 2), swarm.workers[3:])
            await refill(ring, new, (5,), 1)
            outputs = [output]
            for i in (1, 2, 3):
                message = ring.message(i, [5 * i], [5])
                await head.channel.send(message, (text[5 * i : 5 * i + 5],))
                outputs.append(await ring.result(i))
            assert_close(torch.cat(outputs), swarm.expected(text))
            assert head.worker.num_batches == batches


async def test_a_half_filled_successor_is_filled_again() -> None:
    async with ring_of_servers(5) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([14])
        ring = told.ring
        (leg,) = await replace(ring, slice(1, 2), swarm.workers[3:4])
        await refill(ring, [leg], (8,), told.step_id + 1)
        assert leg.worker.session.lengths == (8,)
        await refill(ring, [leg], told.lengths, told.step_id + 1)
        await told.step([2])
        # What it did since is forgotten with the rows, and done again.
        before, batches = told.lengths[0] - 2, leg.worker.num_batches
        await refill(ring, [leg], (before,), told.step_id)
        (again,) = await ring.step(told.step_id, [before], [told.rows[0][before:]])
        assert_close(again, swarm.expected(told.rows[0])[before:])
        assert leg.worker.num_batches > batches and leg.worker.session.lengths == told.lengths


async def test_a_replay_shows_the_rows_as_they_were_when_it_was_asked_for() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([30])
        ring = told.ring
        (leg,) = await replace(ring, slice(1, 2), swarm.workers[3:])
        head = ring.legs[0]
        replay = ReplayRequest(ring.session_id, ring.epoch, 7, told.lengths, (leg.next_hop,))
        await head.channel.send(replay)
        # The head goes on at once, with other tokens from position 2.
        other = Step(ring.session_id, ring.epoch, 7, (2,), (20,))
        await head.channel.send(other, (states(20, seed=5),))
        assert isinstance((await head.hear())[0], StepResult)
        await ring.replayed(leg)
        # The successor has the old rows: what follows them comes out right.
        new = states(1, seed=6)
        first = await swarm.ring((10, 11), session_id=b"f" * 16)
        (hidden,) = await first.step(0, [0], [torch.cat([told.rows[0], new])])
        ring.legs = ring.legs[1:]
        (output,) = await ring.step(8, [30], [hidden[30:]])
        assert_close(output, swarm.expected(torch.cat([told.rows[0], new]))[30:])


async def test_a_replay_by_the_client_refills_the_first_hop() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([9, 7])
        ring = told.ring
        ring.epoch += 1
        swarm.net.kill(ring.legs[0].worker.peer_id)
        new = await ring.open(swarm.workers[3], PARTS[0], rows=2)
        ring.legs[0] = new
        await ring.announce(*ring.legs[1:])
        for starts, counts, rows, ends in (
            ((0, 0), (9, 1), (told.rows[0], told.rows[1][:1]), False),
            ((9, 1), (0, 6), (told.rows[1][1:],), True),
        ):
            step = Step(ring.session_id, 1, 1, starts, counts, replay=True, ends=ends)
            await new.channel.send(step, (torch.cat(rows),))
        await ring.replayed(new)
        await told.step([1, 1])


async def test_outputs_that_made_room_for_others_are_not_replayed() -> None:
    async with ring_of_servers(4, outbox_bytes=15 * 48 * 4) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([9])
        other = await swarm.ring((10, 11), session_id=b"o" * 16)
        await other.step(0, [0], [states(8)])
        ring = told.ring
        (leg,) = await replace(ring, slice(1, 2), swarm.workers[3:])
        replay = ReplayRequest(ring.session_id, ring.epoch, 7, told.lengths, (leg.next_hop,))
        await ring.legs[0].channel.send(replay)
        answer, _ = await ring.legs[0].hear()
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.step_id) == ("outbox_lost", 7) and answer.hint
        assert leg.worker.session.lengths == (0,)


async def test_a_replay_that_reaches_nobody_says_so() -> None:
    async with ring_of_servers(5) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([9])
        ring = told.ring
        new = await replace(ring, slice(1, 2), swarm.workers[3:])
        swarm.workers[4].node.stop_serving(RING_SERVICE)
        hops = tuple(leg.next_hop for leg in new)
        replay = ReplayRequest(ring.session_id, ring.epoch, 7, told.lengths, hops)
        await ring.legs[0].channel.send(replay)
        answer, _ = await new[0].hear()
        assert answer == ReplayDone(ring.session_id, ring.epoch, hops[1:])
        swarm.workers[3].node.stop_serving(RING_SERVICE)
        ring.swarm.workers[0].service.ring._links._lanes.clear()
        await ring.legs[0].channel.send(replay)
        answer, _ = await ring.legs[0].hear()
        assert answer == ReplayDone(ring.session_id, ring.epoch, hops)


@pytest.mark.parametrize(
    ("lengths", "reorder", "hops", "code"),
    [((9, 9), None, 0, "bad_input"), ((9, 9), None, 1, "bad_input")],
)
async def test_replays_that_cannot_be(lengths, reorder, hops, code) -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=1)
        await told.step([9])
        next_hops = (told.ring.legs[1].next_hop,) * hops
        replay = ReplayRequest(told.ring.session_id, 0, 3, lengths, next_hops, reorder)
        await told.ring.legs[0].channel.send(replay)
        answer, _ = await told.ring.legs[0].hear()
        assert isinstance(answer, Refusal) and (answer.code, answer.step_id) == (code, 3)
        await told.step([1])


async def test_a_replay_holds_nobody_up() -> None:
    async with ring_of_servers(4) as swarm:
        told = await ring_for(swarm, rows=2)
        await told.step([60, 55])
        ring = told.ring
        (leg,) = await replace(ring, slice(1, 2), swarm.workers[3:], rows=2)
        other = StepForwarder(swarm, swarm.client, b"o" * 16)
        for worker, blocks in ((swarm.workers[0], (10, 11)), (swarm.workers[3], (11, 14))):
            await other.add(worker, blocks)
        text = states(6)
        refilling = asyncio.create_task(refill(ring, [leg], told.lengths, told.step_id + 1))
        outputs = [(await other.step(i, [i], [text[i : i + 1]]))[0] for i in range(6)]
        assert_close(torch.cat(outputs), swarm.expected(text))
        await refilling
        await told.step([1, 1])
