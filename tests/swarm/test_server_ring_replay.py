"""A hop that takes over is filled from its predecessor's log and goes on with the same numbers."""

import pytest
import torch

from petals.wire.replies import ReplayDone
from petals.wire.requests import ReplayPart
from support.linked_script import (
    HISTORIES,
    PARTS,
    linked,
    linked_servers,
)
from support.models import WIDTH
from support.reference import assert_close, states


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


@pytest.mark.parametrize("at", [3, 5], ids=["tokens twice", "tokens are missing"])
async def test_a_part_that_does_not_follow_the_rows_is_refused(at: int) -> None:
    """How parts are numbered: tests/unit/server/session."""
    async with linked_servers(1) as swarm:
        (leg,) = (await linked(swarm, (10, 14))).legs
        text = states(12)
        first = ReplayPart(leg.header(10), 0, 5, (0,), (4,), (0,))
        await leg.channel.send(first, (text[:4],))
        gap = ReplayPart(leg.header(10), 1, 5, (at,), (4,))
        assert (await leg.refused(gap, text[at : at + 4])).code == "session_gap"
        (output,) = await leg.step(5, [4], [text[4:5]])
        assert_close(output, swarm.expected(text)[4:5])
