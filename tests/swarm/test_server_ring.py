"""States that run in a ring of servers: the same numbers as in a star, and nobody cuts in."""

from collections.abc import Sequence

import pytest
import torch

from petals.errors import PeerUnreachable
from petals.server.network.forwarding import HOLD_SECONDS, MAX_HELD_PER_PEER
from petals.server.policies import SchedulerConfig
from petals.server.session.session import MAX_WAITING_STEPS
from petals.testing.manual_clock import ManualClock
from petals.wire.handshake import Refusal
from petals.wire.replies import ForwardFailed, SessionEnded, StepResult
from petals.wire.requests import BeginEpoch, CloseSession, Forwarded, KeepSession, Step
from petals.wire.services import RING_SERVICE
from support.linked_services import RingOfServers, StepForwarder, Worker, ring_of_servers
from support.service import assert_close, states

THIRDS = ((10, 11), (11, 13), (13, 14))


@pytest.mark.parametrize("model", ["llama", "bloom"])
async def test_a_ring_gives_what_the_whole_model_gives(model: str) -> None:
    async with ring_of_servers(3, model) as swarm:
        ring = await swarm.ring(*THIRDS, rows=2)
        texts = [states(12, seed=1), states(9, seed=2)]
        first = await ring.step(0, [0, 0], [texts[0][:7], texts[1][:3]])
        second = await ring.step(1, [7, 3], [texts[0][7:8], texts[1][3:]])
        third = await ring.step(2, [8, 9], [texts[0][8:], texts[1][9:]])
        for text, *parts in zip(texts, first, second, third):
            assert_close(torch.cat(parts), swarm.expected(text))


async def test_a_ring_equals_a_star_and_no_state_between_hops_meets_the_client() -> None:
    async with ring_of_servers(3) as swarm:
        text, heard = states(10), dict.fromkeys([w.peer_id for w in swarm.workers], 0)
        ring = await swarm.ring(*THIRDS)

        def count(source: str, target: str, num_bytes: int) -> None:
            if target == swarm.client.peer_id:
                heard[source] += num_bytes

        swarm.net.on_write = count
        (ringed,) = await ring.step(0, [0], [text])
        head, middle, tail = (heard[worker.peer_id] for worker in swarm.workers)
        assert max(head, middle) < text.nbytes / 4 < text.nbytes < tail
        star = await swarm.ring(*THIRDS, session_id=b"t" * 16)
        hidden = text
        for leg in star.legs:
            message = Step(star.session_id, 0, 0, (0,), (10,))
            _, (hidden,) = await leg.channel.request(message, (hidden,), expect=StepResult)
        assert torch.equal(ringed, hidden)


async def test_rollback_and_reorder_ride_along() -> None:
    async with ring_of_servers(2) as swarm:
        ring = await swarm.ring((10, 12), (12, 14), rows=2)
        texts = [states(8, seed=1), states(6, seed=2)]
        await ring.step(0, [0, 0], texts)
        token = [states(1, seed=7), states(2, seed=8), states(1, seed=9)]
        outputs = await ring.step(1, [6, 5, 3], token, reorder=(1, 0, 1))
        for output, old, start, new in zip(outputs, (1, 0, 1), (6, 5, 3), token):
            assert_close(output, swarm.expected(torch.cat([texts[old][:start], new]))[start:])


async def test_one_server_may_be_several_hops() -> None:
    async with ring_of_servers(2) as swarm:
        one, other = swarm.workers
        ring, text = StepForwarder(swarm, swarm.client), states(7)
        for worker, blocks in (
            (one, (10, 11)),
            (one, (11, 12)),
            (other, (12, 13)),
            (one, (13, 14)),
        ):
            await ring.add(worker, blocks)
        (output,) = await ring.step(0, [0], [text[:6]])
        (last,) = await ring.step(1, [6], [text[6:]])
        assert_close(torch.cat([output, last]), swarm.expected(text))


async def test_a_prompt_runs_through_the_hops_in_pieces() -> None:
    async with ring_of_servers(3) as swarm:
        ring, text = await swarm.ring(*THIRDS), states(40)
        for i in range(8):
            message = ring.message(i, [5 * i], [5])
            await ring.legs[0].channel.send(message, (text[5 * i : 5 * i + 5],))
        outputs = [await ring.result(i) for i in range(8)]
        assert_close(torch.cat(outputs), swarm.expected(text))
        # Every piece is answered again, from any of them on, without being run again.
        batches = [worker.num_batches for worker in swarm.workers]
        for i in (3, 7, 0):
            message = ring.message(i, [5 * i], [5])
            await ring.legs[0].channel.send(message, (text[5 * i : 5 * i + 5],))
            assert torch.equal(await ring.result(i), outputs[i])
        assert [worker.num_batches for worker in swarm.workers] == batches


async def test_a_step_behind_a_rollback_is_not_answered_from_memory() -> None:
    async with ring_of_servers(1) as swarm:
        ring, text = await swarm.ring((10, 14)), states(9)
        for i in range(3):
            await ring.step(i, [3 * i], [text[3 * i : 3 * i + 3]])
        await ring.step(3, [4], [text[4:5]])
        leg = ring.legs[0]
        (first,) = await ring.step(0, [0], [text[:3]])
        assert_close(first, swarm.expected(text)[:3])
        await leg.channel.send(ring.message(1, [3], [3]), (text[3:6],))
        answer, _ = await leg.hear()
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.step_id) == ("session_gap", 1)


async def test_sessions_share_one_channel_between_two_servers() -> None:
    async with ring_of_servers(2, scheduling=SchedulerConfig(max_batch_tokens=64)) as swarm:
        head, tail = swarm.workers
        for number in range(3):
            ring = await swarm.ring((10, 12), (12, 14), session_id=bytes([number]) * 16)
            text = states(6, seed=number)
            (output,) = await ring.step(0, [0], [text])
            assert_close(output, swarm.expected(text))
        assert head.service.ring._links.num_open == 1
        assert tail.service.ring._links.num_open == 0


class TestFaults:
    async def test_a_hop_that_is_gone_is_left_to_the_client(self) -> None:
        async with ring_of_servers(3) as swarm:
            ring, text = await swarm.ring(*THIRDS), states(6)
            swarm.net.kill(swarm.workers[1].peer_id)
            message = ring.message(0, [0], [6])
            await ring.legs[0].channel.send(message, (text,))
            answer, (hidden,) = await ring.legs[0].hear()
            assert isinstance(answer, StepResult)
            assert answer.undelivered == message.next_hops
            alone = await swarm.ring(THIRDS[0], session_id=b"a" * 16)
            assert_close(hidden, (await alone.step(0, [0], [text]))[0])

    async def test_the_client_carries_on_behind_an_edge_that_fails(self) -> None:
        async with ring_of_servers(3) as swarm:
            ring, text = await swarm.ring(*THIRDS), states(6)
            swarm.workers[1].node.stop_serving(RING_SERVICE)
            await ring.legs[0].channel.send(ring.message(0, [0], [6]), (text,))
            answer, (hidden,) = await ring.legs[0].hear()
            assert isinstance(answer, StepResult) and len(answer.undelivered) == 2
            onward = ring.message(0, [0], [6], first=1)
            await ring.legs[1].channel.send(onward, (hidden,))
            answer, (output,) = await ring.legs[2].hear()
            assert_close(output, swarm.expected(text))

    async def test_a_channel_that_broke_is_opened_again(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            (first,) = await ring.step(0, [0], [text[:5]])
            links = swarm.workers[0].service.ring._links
            (lane,) = links._lanes.values()
            lane.channel.abort(PeerUnreachable("cut"))
            (last,) = await ring.step(1, [5], [text[5:]])
            assert_close(torch.cat([first, last]), swarm.expected(text))
            assert links.num_open == 1

    async def test_who_waits_for_what_a_broken_lane_has_swallowed_is_told(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            await ring.step(0, [0], [text[:5]])
            head, tail = swarm.workers
            (lane,) = head.service.ring._links._lanes.values()
            await lane.channel.ping()
            swarm.net.cut(head.peer_id, tail.peer_id)
            await ring.legs[0].channel.send(ring.message(1, [5], [1]), (text[5:],))
            await until_idle(swarm, step_id=1, workers=[head])
            lane.channel.abort(PeerUnreachable("reset"))
            told, _ = await ring.legs[0].channel.receive(10.0)
            assert told == ForwardFailed(ring.session_id, 0, 1)

    async def test_nobody_is_told_of_what_an_older_epoch_has_lost(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            await ring.step(0, [0], [text[:5]])
            head = swarm.workers[0]
            ring.epoch = 1
            await ring.announce(*ring.legs)
            await ring.legs[0].channel.ping()
            (lane,) = head.service.ring._links._lanes.values()
            lane.channel.abort(PeerUnreachable("reset"))
            await ring.legs[0].channel.send(ring.message(1, [5], [1]), (text[5:],))
            answer, _ = await ring.legs[1].channel.receive(10.0)
            assert isinstance(answer, StepResult)
            assert not ring.legs[0].channel._inbox.ready

    async def test_a_session_outlives_its_clients_connection(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            await ring.step(0, [0], [text[:5]])
            await ring.legs[1].channel.close()
            await ring.legs[0].channel.send(ring.message(1, [5], [1]), (text[5:],))
            await until_idle(swarm, step_id=1)
            batches = [worker.num_batches for worker in swarm.workers]
            leg = ring.legs[1]
            leg.channel = await swarm.client.open_channel(leg.worker.peer_id, "blocks")
            await leg.channel.send(KeepSession(ring.session_id, leg.blocks))
            (output,) = await ring.step(1, [5], [text[5:]])
            assert_close(output, swarm.expected(text)[5:])
            assert [worker.num_batches for worker in swarm.workers] == batches

    @pytest.mark.parametrize("message", [KeepSession(b"x" * 16), BeginEpoch(b"x" * 16, 3, ())])
    async def test_who_speaks_of_a_session_that_is_gone_is_told(self, message: object) -> None:
        async with ring_of_servers(1) as swarm:
            ring = await swarm.ring((10, 14))
            await ring.legs[0].channel.send(message)
            answer, _ = await ring.legs[0].hear()
            assert isinstance(answer, SessionEnded) and answer.session_id == b"x" * 16

    async def test_an_error_of_a_later_hop_is_told_on_its_own_channel(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            await ring.step(0, [0], [text[:5]])
            lost = Step(ring.session_id, 0, 1, (5,), (1,))
            await ring.legs[0].channel.request(lost, (text[5:],), expect=StepResult)
            await ring.legs[0].channel.send(ring.message(2, [6], [1]), (text[5:],))
            answer, _ = await ring.legs[1].hear()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.step_id) == ("session_gap", 2)


class TestStrangers:
    """Nothing but a refusal for whoever the client has not named."""

    @pytest.mark.parametrize("epoch", [0, 5])
    async def test_a_third_member_gets_a_refusal_and_nothing_else(self, epoch: int) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(8)
            await ring.step(0, [0], [text[:5]])
            worker = swarm.workers[1]
            before = snapshot(worker)
            channel = await swarm.stranger.open_channel(worker.peer_id, RING_SERVICE)
            push = Forwarded(
                swarm.client.peer_id, (12, 14), Step(ring.session_id, epoch, 1, (2,), (3,))
            )
            answer, tensors = await request(channel, push, states(3))
            assert isinstance(answer, Refusal) and not tensors
            assert (answer.code, answer.step_id) == ("session_closed", 1)
            assert snapshot(worker) == before
            absent = Forwarded(swarm.client.peer_id, (11, 14), push.step)
            told, _ = await request(channel, absent, states(3))
            assert (told.code, told.message) == (answer.code, answer.message)
            (last,) = await ring.step(1, [5], [text[5:]])
            assert_close(last, swarm.expected(text)[5:])
            assert not channel.is_closed

    async def test_a_hop_speaks_for_no_other_client_and_no_other_blocks(self) -> None:
        async with ring_of_servers(2) as swarm:
            await swarm.ring((10, 12), (12, 14))
            head, tail = swarm.workers
            channel = await head.node.open_channel(tail.peer_id, RING_SERVICE)
            step = Step(b"s" * 16, 0, 0, (0,), (3,))
            for push in (
                Forwarded(swarm.stranger.peer_id, (12, 14), step),
                Forwarded(swarm.client.peer_id, (12, 13), step),
            ):
                answer, _ = await request(channel, push, states(3))
                assert isinstance(answer, Refusal) and answer.code == "session_closed"

    async def test_the_head_of_an_arc_takes_states_from_its_client_only(self) -> None:
        async with ring_of_servers(2) as swarm:
            await swarm.ring((10, 12), (12, 14))
            head, tail = swarm.workers
            channel = await tail.node.open_channel(head.peer_id, RING_SERVICE)
            push = Forwarded(swarm.client.peer_id, (10, 12), Step(b"s" * 16, 0, 0, (0,), (3,)))
            answer, _ = await request(channel, push, states(3))
            assert isinstance(answer, Refusal) and answer.code == "session_closed"

    async def test_what_is_no_push_ends_the_channel(self) -> None:
        async with ring_of_servers(1) as swarm:
            channel = await swarm.stranger.open_channel(swarm.workers[0].peer_id, RING_SERVICE)
            answer, _ = await request(channel, CloseSession(b"s" * 16))
            assert isinstance(answer, Refusal) and answer.code == "protocol"


class TestEpochs:
    async def test_frames_of_an_older_epoch_change_nothing(self) -> None:
        async with ring_of_servers(2) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            await ring.step(0, [0], [text[:5]])
            head, tail = swarm.workers
            ring.epoch = 1
            await ring.announce(*ring.legs)
            # The head's client has spoken; what the head says for the old epoch is dropped.
            channel = await head.node.open_channel(tail.peer_id, RING_SERVICE)
            old = Forwarded(
                swarm.client.peer_id, (12, 14), Step(ring.session_id, 0, 1, (2,), (3,))
            )
            (last,) = await ring.step(1, [5], [text[5:]])
            before = snapshot(tail)
            await channel.send(old, (states(3),))
            await channel.send(CloseSession(ring.session_id))  # refused: what was before it is read
            assert isinstance((await channel.receive(10.0))[0], Refusal)
            assert snapshot(tail) == before
            assert_close(last, swarm.expected(text)[5:])

    async def test_frames_of_a_newer_epoch_wait_for_it(self) -> None:
        async with ring_of_servers(3) as swarm:
            ring, text = await swarm.ring((10, 12), (12, 14)), states(6)
            tail, new = ring.legs[1], swarm.workers[2]
            await ring.step(0, [0], [text[:3]])
            # A new head pushes before the tail has heard of it.
            ring.epoch = 1
            inner = await swarm.ring((10, 12), session_id=b"i" * 16)
            (hidden,) = await inner.step(0, [0], [text])
            channel = await new.node.open_channel(tail.worker.peer_id, RING_SERVICE)
            for step_id, at in ((1, 3), (2, 4), (3, 5)):
                step = Step(ring.session_id, 1, step_id, (at,), (1,))
                await channel.send(
                    Forwarded(swarm.client.peer_id, (12, 14), step), (hidden[at : at + 1],)
                )
            await channel.ping()
            before = snapshot(tail.worker)
            await tail.channel.send(BeginEpoch(ring.session_id, 1, (new.peer_id,)))
            outputs = [(await tail.hear())[1][0] for _ in range(3)]
            assert_close(torch.cat(outputs), swarm.expected(text)[3:])
            assert before[0] == (3,)

    async def test_they_do_not_wait_for_ever_nor_in_any_number(self) -> None:
        clock = ManualClock()
        async with ring_of_servers(2, clock=clock) as swarm:
            ring = await swarm.ring((10, 12), (12, 14))
            tail = ring.legs[1].worker
            before = snapshot(tail)
            channel = await swarm.stranger.open_channel(tail.peer_id, RING_SERVICE)
            for step_id in range(MAX_HELD_PER_PEER + 1):
                step = Step(ring.session_id, 3, step_id, (0,), (3,))
                await channel.send(
                    Forwarded(swarm.client.peer_id, (12, 14), step), (states(3),)
                )
            answer, _ = await channel.receive()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.step_id) == ("peer_busy", MAX_HELD_PER_PEER)
            await clock.advance(HOLD_SECONDS)
            answers = [(await channel.receive())[0] for _ in range(MAX_HELD_PER_PEER)]
            assert {answer.code for answer in answers} == {"session_closed"}
            assert snapshot(tail) == before
            assert not tail.service.bytes._used


async def test_more_steps_than_may_wait_are_refused() -> None:
    async with ring_of_servers(1) as swarm:
        ring, text = await swarm.ring((10, 14)), states(1)
        leg = ring.legs[0]
        for i in range(MAX_WAITING_STEPS + 4):
            await leg.channel.send(ring.message(i, [i], [1]), (text,))
        answers = [(await leg.hear())[0] for _ in range(MAX_WAITING_STEPS + 4)]
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        assert {answer.code for answer in refused} <= {"peer_busy", "session_gap"}
        assert len(refused) <= 4


def snapshot(worker: Worker) -> tuple[object, ...]:
    """All that a frame could have changed."""
    session = worker.session
    lengths = tuple(row.length for row in session.kv.rows)
    return lengths, session.lengths, session.outbox.lengths, session.epoch, worker.num_batches


async def request(channel, message, *tensors):
    await channel.send(message, tensors)
    return await channel.receive(10.0)


async def until_idle(
    swarm: RingOfServers, step_id: int, workers: Sequence[Worker] | None = None
) -> None:
    """Until every server has done step ``step_id`` and has nothing more to say."""
    for worker in swarm.workers if workers is None else workers:
        while worker.session._last_step_id < step_id or worker.session.tasks:
            await worker.service.executor.call(lambda: None)
