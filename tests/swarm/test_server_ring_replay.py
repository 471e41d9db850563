"""A hop that takes over is filled from its predecessor's log and goes on with the same numbers."""

import pytest
import torch

from petals.wire.replies import ReplayDone, StepResult
from petals.wire.requests import ReplayPart
from support.linked_script import (
    HISTORIES,
    PARTS,
    Leg,
    LinkedSession,
    linked,
    linked_servers,
)
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import FussySpan, Served


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
@pytest.mark.parametrize("num_new", [1, 2])
async def test_a_successor_goes_on_with_the_same_numbers(model, history, num_new) -> None:
    async with linked_servers(5, model) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await history(session)
        new = await session.replace(slice(1, 2), swarm.workers[3 : 3 + num_new], rows=2)
        # Enough in one go for any history: the pending step comes after it.
        await session.refill(new, session.step_id + 1)
        assert {leg.worker.session.rows.lengths for leg in new} == {session.lengths}
        assert {leg.worker.session.rows.outputs.lengths for leg in new} == {session.lengths}
        await session.step([2] * len(session.rows))
        await session.step([1] * len(session.rows), [length - 1 for length in session.lengths])


async def test_a_replay_goes_on_where_one_ended() -> None:
    """Steps go on through the old hop meanwhile: one token, a reorder, a rollback."""
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS, rows=2)
        await session.step([9, 12])
        head = session.legs[0]
        new = await session.open(swarm.workers[3], PARTS[1], 2, (head.worker.peer_id,))
        await session.fill(head, [new], 10)
        session.step_id = 10
        await session.step([1, 1], [12, 9], (1, 0))
        await session.step([2, 1], [11, 10])
        await session.fill(head, [new], 20, base_rows=(1, 0), starts=(11, 9))
        assert new.worker.session.rows.lengths == session.lengths
        session.legs[1], session.step_id = new, 20
        await session.begin_epoch()
        await session.step([1, 1])


async def test_a_replay_without_next_hops_brings_the_rows_to_the_client() -> None:
    async with linked_servers(1) as swarm:
        session = await linked(swarm, (10, 14), rows=2)
        await session.step([9, 4])
        head = session.legs[0]
        request = session.replay(head, [], 1)
        await head.channel.send(request)
        parts, tensors = [], []
        while not parts or not parts[-1].ends:
            part, (hidden,) = await head.channel.receive(10.0)
            assert isinstance(part, ReplayPart) and part.header == request.header
            parts.append(part)
            tensors.append(hidden)
        assert [part.index for part in parts] == [0, 1, 2]
        for output, row in zip(torch.cat(tensors).split((9, 4)), session.rows):
            assert_close(output, swarm.expected(row))


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
        async with linked_servers(5) as swarm:
            session = await linked(swarm, *PARTS, rows=2)
            await session.step([9, 12])
            lengths, head = session.lengths, session.legs[0]
            pending = session.take(counts, starts, reorder)
            swarm.net.kill(swarm.workers[1].peer_id)
            await session.send(session.step_id, starts, pending, reorder)
            answer, _ = await head.hear()
            assert isinstance(answer, StepResult) and len(answer.undelivered) == 2
            batches = head.worker.num_batches
            # The second successor dies as well, before it has done the step.
            for workers in (swarm.workers[3:4], swarm.workers[4:]):
                new = await session.replace(slice(1, 2), workers, rows=2)
                await session.refill(new, session.step_id, lengths, reorder)
            outputs = await session.ask(session.step_id, starts, pending, reorder)
            session.check(starts, outputs)
            assert head.worker.num_batches == batches
            await session.step([1] * len(session.rows))


async def test_a_replay_shows_the_rows_as_they_were_when_it_was_asked_for() -> None:
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS)
        await session.step([30])
        (leg,) = await session.replace(slice(1, 2), swarm.workers[3:])
        head = session.legs[0]
        request = session.replay(head, [leg], 7)
        await head.channel.send(request)
        # The head goes on at once, with other tokens from position 2.
        await head.step(7, [2], [states(20, seed=5)])
        await session.filled(leg, request)
        # The successor has the old rows: what follows them comes out right.
        text = torch.cat([session.rows[0], states(1, seed=6)])
        first = await linked(swarm, (10, 11))
        (hidden,) = await first.ask(0, [0], [text])
        session.legs = session.legs[1:]
        (output,) = await session.ask(8, [30], [hidden[30:]])
        assert_close(output, swarm.expected(text)[30:])


async def test_outputs_that_made_room_for_others_are_not_replayed() -> None:
    async with linked_servers(4, log_bytes=15 * WIDTH * 4) as swarm:
        session = await linked(swarm, *PARTS)
        await session.step([9])
        other = await linked(swarm, (10, 11))
        await other.ask(0, [0], [states(8)])
        (leg,) = await session.replace(slice(1, 2), swarm.workers[3:])
        head = session.legs[0]
        refusal = await head.refused(session.replay(head, [leg], 7))
        assert refusal.code == "outbox_lost" and refusal.hint
        assert leg.worker.session.rows.lengths == (0,)
        # Nor is a step that comes again made up.
        refusal = await head.refused(head.message(0, (0,), (9,)), states(9))
        assert refusal.code == "session_gap"


async def test_a_replay_that_reaches_nobody_says_so() -> None:
    async with linked_servers(5) as swarm:
        session = await linked(swarm, *PARTS)
        await session.step([9])
        new = await session.replace(slice(1, 2), swarm.workers[3:])
        head, request = session.legs[0], session.replay(session.legs[0], new, 7)
        swarm.net.hide(swarm.workers[4].peer_id)
        await head.channel.send(request)
        answer, _ = await new[0].hear()
        header = new[0].header(request.header.request_id)
        assert answer == ReplayDone(header, request.next_hops[1:])
        swarm.net.kill(swarm.workers[3].peer_id)
        request = session.replay(head, new, 7)
        await head.channel.send(request)
        answer, _ = await head.hear()
        assert answer == ReplayDone(request.header, request.next_hops)


@pytest.mark.parametrize("num_hops", [0, 1])
@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ((9, 9), {}),
        ((), {}),
        ((9,), {"base_rows": (0, 0), "starts": (0, 0)}),
        ((9,), {"base_rows": (0, 0), "starts": (0,)}),
        ((9,), {"base_rows": (0,)}),
    ],
)
async def test_replays_that_cannot_be(lengths, changes, num_hops) -> None:
    async with linked_servers(4) as swarm:
        session = await linked(swarm, *PARTS)
        await session.step([9])
        head = session.legs[0]
        request = session.replay(head, session.legs[1 : 1 + num_hops], 3, lengths, **changes)
        assert (await head.refused(request)).code == "bad_input"
        await session.step([1])


TEXT = states(12, seed=3)
OLD = states(12, seed=4)


class TestParts:
    """A hop with all blocks is filled by the client, part by part: the rules of their numbers.

    Replays have the ids 10, 20, ...; TEXT is right, OLD is what an earlier replay was about.
    """

    async def leg(self, swarm: Served) -> Leg:
        return await LinkedSession(swarm, swarm.client).open(swarm.workers[0], (10, 14))

    def part(self, leg: Leg, replay: int, index: int, at: int, count: int, **changes) -> ReplayPart:
        reorder = None if index else (0,)
        header = leg.header(replay)
        return ReplayPart(header, index, 5, (at,), (count,), reorder, **changes)

    async def goes_on(self, leg: Leg, swarm: Served, length: int) -> None:
        """The rows hold TEXT as far as ``length``; nothing else is on its way."""
        (output,) = await leg.step(5, [length], [TEXT[length : length + 1]])
        assert_close(output, swarm.expected(TEXT)[length : length + 1])

    @pytest.mark.parametrize("has_ended", [False, True])
    async def test_a_late_part_of_an_earlier_replay_is_dropped(self, has_ended: bool) -> None:
        """It would put rows that were right once in the place of those that are right now."""
        async with linked_servers(1) as swarm:
            leg = await self.leg(swarm)
            await leg.channel.send(self.part(leg, 10, 0, 0, 4), (OLD[:4],))
            await leg.channel.send(self.part(leg, 20, 0, 0, 8, ends=has_ended), (TEXT[:8],))
            if has_ended:
                assert isinstance((await leg.channel.receive(10.0))[0], ReplayDone)
            for late in (
                (self.part(leg, 10, 1, 4, 4), OLD[4:8]),
                (self.part(leg, 10, 0, 0, 8, ends=True), OLD[:8]),
            ):
                await leg.channel.send(late[0], (late[1],))
            if not has_ended:
                await leg.ask(self.part(leg, 20, 1, 8, 1, ends=True), TEXT[8:9])
            await self.goes_on(leg, swarm, 8 if has_ended else 9)

    @pytest.mark.parametrize("is_touched", [True, False])
    async def test_a_part_that_fails_ends_its_replay_if_it_has_touched_the_rows(
        self, is_touched: bool
    ) -> None:
        async with linked_servers(1) as swarm:
            leg = await self.leg(swarm)
            await leg.channel.send(self.part(leg, 10, 0, 0, 4), (TEXT[:4],))
            part = self.part(leg, 10, 1, 4, 1)
            value = FussySpan.poison if is_touched else float("nan")
            refusal = await leg.refused(part, torch.full((1, WIDTH), value))
            assert refusal.code == ("peer_failed" if is_touched else "bad_input")
            last = self.part(leg, 10, 2, 5, 3, ends=True)
            if is_touched:
                assert (await leg.refused(last, TEXT[5:8])).code == "session_gap"
                last = self.part(leg, 20, 0, 0, 8, ends=True)
                answer, _ = await leg.ask(last, TEXT[:8])
            else:
                await leg.channel.send(part, (TEXT[4:5],))
                answer, _ = await leg.ask(last, TEXT[5:8])
            assert answer == ReplayDone(last.header)
            await self.goes_on(leg, swarm, 8)

    async def test_a_step_ends_a_replay(self) -> None:
        async with linked_servers(1) as swarm:
            leg = await self.leg(swarm)
            await leg.channel.send(self.part(leg, 10, 0, 0, 4), (TEXT[:4],))
            (output,) = await leg.step(40, [4], [TEXT[4:5]])
            assert_close(output, swarm.expected(TEXT)[4:5])
            await leg.channel.send(self.part(leg, 10, 1, 5, 3, ends=True), (OLD[5:8],))
            (output,) = await leg.step(41, [5], [TEXT[5:6]])
            assert_close(output, swarm.expected(TEXT)[5:6])
