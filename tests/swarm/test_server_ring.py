"""States that servers forward to each other: the same numbers as through the client, and nobody
cuts in.
"""

import pytest
import torch

from petals.errors import PeerUnreachable
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.channel import Channel
from petals.testing.manual_clock import ManualClock, settle
from petals.wire.handshake import Refusal
from petals.wire.header import RequestHeader
from petals.wire.messages import AnyMessage
from petals.wire.replies import ForwardFailed, SessionEnded
from petals.wire.requests import BeginEpoch, CloseSession, Forwarded, KeepSession, Step
from petals.wire.services import RING_SERVICE
from support.linked_script import LinkedSession, linked, linked_servers
from support.reference import assert_close, states
from support.service import Worker
from support.talk import Answer

THIRDS = ((10, 11), (11, 13), (13, 14))
HALVES = ((10, 12), (12, 14))


@pytest.mark.parametrize("model", ["llama", "bloom"])
async def test_a_ring_gives_what_the_whole_model_gives(model: str) -> None:
    async with linked_servers(3, model) as swarm:
        session = await linked(swarm, *THIRDS, rows=2)
        await session.step([7, 3])
        await session.step([1, 6])
        await session.step([4, 0])


async def test_one_server_may_be_several_hops() -> None:
    async with linked_servers(2) as swarm:
        one, other = swarm.workers
        session = LinkedSession(swarm, swarm.client, rows=[states(0)])
        for worker, blocks in ((one, (10, 11)), (other, (11, 13)), (one, (13, 14))):
            await session.add(worker, blocks)
        await session.step([6])
        await session.step([1])


async def test_a_prompt_runs_through_the_hops_in_pieces() -> None:
    async with linked_servers(3) as swarm:
        ring, text = await linked(swarm, *THIRDS), states(40)
        for i in range(8):
            await ring.send(i, [5 * i], [text[5 * i : 5 * i + 5]])
        outputs = [await ring.result(i) for i in range(8)]
        assert_close(torch.cat(outputs), swarm.expected(text))
        # Every piece is answered again, from any of them on, without being run again.
        batches = ring.num_batches
        for i in (3, 7, 0):
            await ring.send(i, [5 * i], [text[5 * i : 5 * i + 5]])
            assert torch.equal(await ring.result(i), outputs[i])
        assert ring.num_batches == batches


class TestFaults:
    async def test_who_waits_for_what_a_broken_link_has_swallowed_is_told(self) -> None:
        async with linked_servers(2) as swarm:
            session, links = await linked(swarm, *HALVES), links_into(swarm.workers[1])
            await session.step([5])
            head, tail = swarm.workers
            swarm.net.cut(head.peer_id, tail.peer_id)
            await session.send(1, [5], [states(1)])
            await until_done(head, step_id=1)
            links[0].abort(PeerUnreachable("reset"))
            # Nothing has confirmed yet that the step before has arrived.
            told = [(await session.legs[0].channel.receive(10.0))[0] for _ in range(2)]
            assert told == [ForwardFailed(session.legs[0].header(step_id)) for step_id in (0, 1)]

    async def test_nobody_is_told_of_what_an_older_epoch_has_lost(self) -> None:
        async with linked_servers(2) as swarm:
            session, links = await linked(swarm, *HALVES), links_into(swarm.workers[1])
            await session.step([5])
            await session.begin_epoch()
            await session.legs[0].channel.ping()
            links[0].abort(PeerUnreachable("reset"))
            await session.step([1])
            channel = session.legs[0].channel
            answer, _ = await request(channel, KeepSession(RequestHeader(b"x" * 16, 0)))
            assert isinstance(answer, SessionEnded), "and nothing came before it"

    @pytest.mark.parametrize("kind", [KeepSession, BeginEpoch])
    async def test_who_speaks_of_a_session_that_is_gone_is_told(self, kind: type) -> None:
        async with linked_servers(1) as swarm:
            session, header = await linked(swarm, (10, 14)), RequestHeader(b"x" * 16, 3)
            message = KeepSession(header) if kind is KeepSession else BeginEpoch(header, ())
            answer, _ = await session.legs[0].ask(message)
            assert isinstance(answer, SessionEnded) and answer.header == header

    async def test_an_error_of_a_later_hop_is_told_on_its_own_channel(self) -> None:
        async with linked_servers(2) as swarm:
            session = await linked(swarm, *HALVES)
            await session.step([5])
            head, tail = session.legs
            await head.step(1, [5], [states(1)])  # comes back: the tail does not see it
            await session.send(2, [6], [states(1)])
            answer, _ = await tail.hear()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.header) == ("session_gap", tail.header(2))


class TestStrangers:
    """Nothing but a refusal for whoever the client has not named."""

    @pytest.mark.parametrize("epoch", [0, 5])
    async def test_a_third_member_gets_a_refusal_and_nothing_else(self, epoch: int) -> None:
        async with linked_servers(2) as swarm:
            session = await linked(swarm, *HALVES)
            await session.step([5])
            leg, worker = session.legs[1], swarm.workers[1]
            before = snapshot(worker)
            step = Step(leg.header(1, epoch), (2,), (3,))
            channel, answer = await forward(swarm.stranger, worker, swarm.client, step, states(3))
            assert (answer.code, answer.header) == ("session_closed", step.header)
            assert snapshot(worker) == before
            # As for a session that does not exist.
            absent = Step(RequestHeader(b"x" * 16, epoch, 1), (2,), (3,))
            _, told = await forward(swarm.stranger, worker, swarm.client, absent, states(3))
            assert (told.code, told.message) == (answer.code, answer.message)
            await session.step([1])
            assert not channel.is_closed

    async def test_a_hop_speaks_for_no_other_client_and_no_other_session(self) -> None:
        async with linked_servers(2) as swarm:
            session = await linked(swarm, *HALVES)
            head, tail = swarm.workers
            other = await linked(swarm, (10, 12))
            for client, leg in (
                (swarm.stranger, session.legs[1]),
                (swarm.client, other.legs[0]),  # takes states from its client only
            ):
                step = Step(leg.header(), (0,), (3,))
                _, answer = await forward(tail.node, leg.worker, client, step, states(3))
                assert answer.code == "session_closed"
            step = Step(session.legs[1].header(), (0,), (3,))
            _, answer = await forward(head.node, tail, swarm.stranger, step, states(3))
            assert answer.code == "session_closed"

    async def test_what_is_not_forwarded_ends_the_channel(self) -> None:
        async with linked_servers(1) as swarm:
            channel = await swarm.stranger.open_channel(swarm.workers[0].peer_id, RING_SERVICE)
            answer, _ = await request(channel, CloseSession(RequestHeader(b"s" * 16, 0)))
            assert isinstance(answer, Refusal) and answer.code == "protocol"


class TestEpochs:
    async def test_what_was_run_while_an_epoch_began_is_not_forwarded(self) -> None:
        """Its next hops are those of the old epoch. In the new one it is answered from the log."""
        async with linked_servers(2) as swarm:
            session = await linked(swarm, *HALVES)
            await session.step([5])
            release, batches = swarm.workers[0].hold(), session.num_batches
            new = session.take([1], [5], None)
            await session.send(1, [5], new)
            await settle()
            await session.begin_epoch(session.legs[0])
            await session.legs[0].channel.ping()
            release()
            for worker in swarm.workers:
                await worker.check()
            assert session.num_batches == [batches[0] + 1, batches[1]]
            await session.begin_epoch(session.legs[1], newer=False)
            session.check([5], await session.ask(1, [5], new))
            assert session.num_batches == [batches[0] + 1, batches[1] + 1]

    async def test_a_source_of_the_old_epoch_is_none_of_the_new(self) -> None:
        async with linked_servers(3) as swarm:
            session = await linked(swarm, *HALVES)
            await session.step([5])
            old, tail = swarm.workers[0], session.legs[1]
            session.legs[0] = await session.open(swarm.workers[2], HALVES[0])
            await session.begin_epoch()
            await tail.channel.ping()
            step = Step(tail.header(1), (5,), (1,))
            _, answer = await forward(old.node, tail.worker, swarm.client, step, states(1))
            assert answer.code == "session_closed"

    async def test_messages_of_a_newer_epoch_wait_for_it(self) -> None:
        async with linked_servers(3) as swarm:
            ring, text = await linked(swarm, *HALVES), states(6)
            tail, new = ring.legs[1], swarm.workers[2]
            await ring.ask(0, [0], [text[:3]])
            # A new head forwards before the tail has heard of it.
            inner = await linked(swarm, (10, 12))
            (hidden,) = await inner.ask(0, [0], [text])
            channel = await new.node.open_channel(tail.worker.peer_id, RING_SERVICE)
            for step_id, at, epoch in ((1, 3, 1), (2, 4, 1), (4, 3, 2), (3, 5, 1)):
                step = Step(tail.header(step_id, epoch), (at,), (1,))
                forwarded = Forwarded(swarm.client.peer_id, step)
                await channel.send(forwarded, (hidden[at : at + 1],))
            await channel.ping()
            assert tail.worker.session.rows.lengths == (3,)
            for epoch, step_ids, at in ((1, (1, 2, 3), 3), (2, (4,), 3)):
                await tail.channel.send(BeginEpoch(tail.header(0, epoch), (new.peer_id,)))
                answers = [await tail.hear() for _ in step_ids]
                assert [answer.header.request_id for answer, _ in answers] == list(step_ids)
                outputs = torch.cat([tensors[0] for _, tensors in answers])
                assert_close(outputs, swarm.expected(text)[at : at + len(outputs)])

    async def test_they_do_not_wait_for_ever_nor_in_any_number(self) -> None:
        clock, limits = ManualClock(), FailoverConfig()
        async with linked_servers(2, clock=clock, failover=limits) as swarm:
            session = await linked(swarm, *HALVES)
            leg, tail = session.legs[1], swarm.workers[1]
            before, most = snapshot(tail), limits.max_held_per_peer
            channel = await swarm.stranger.open_channel(tail.peer_id, RING_SERVICE)
            for step_id in range(most + 1):
                step = Step(leg.header(step_id, 3), (0,), (3,))
                await channel.send(Forwarded(swarm.client.peer_id, step), (states(3),))
            answer, _ = await channel.receive()
            assert isinstance(answer, Refusal)
            assert (answer.code, answer.header) == ("peer_busy", leg.header(most, 3))
            # An epoch that is not theirs does not make them wait any longer.
            await clock.advance(0.75 * limits.epoch_hold_seconds)
            await leg.channel.send(BeginEpoch(leg.header(0, 1), ()))
            await clock.advance(0.25 * limits.epoch_hold_seconds)
            answers = [(await channel.receive())[0] for _ in range(most)]
            assert {answer.code for answer in answers} == {"session_closed"}
            assert snapshot(tail)[:3] == before[:3]
            await tail.check()


def snapshot(worker: Worker) -> tuple[object, ...]:
    """All that a frame could have changed."""
    session = worker.session
    lengths = tuple(row.length for row in session.rows.kv.rows)
    log = session.rows.outputs.lengths
    return lengths, log, worker.num_batches, session.epoch, session.sources


def links_into(worker: Worker) -> list[Channel]:
    """The channels that other servers open to this one from now on, at its own end."""
    accepted: list[Channel] = []

    async def noting(channel: Channel) -> None:
        accepted.append(channel)
        await worker.service.serve_forwarded(channel)

    worker.node.serve(RING_SERVICE, noting)
    return accepted


async def request(channel: Channel, message: AnyMessage, *tensors: torch.Tensor) -> Answer:
    await channel.send(message, tensors)
    return await channel.receive(10.0)


async def forward(
    source: SwarmNode, target: Worker, client: SwarmNode, message: Step, *tensors: torch.Tensor
) -> tuple[Channel, Refusal]:
    """What ``source`` is answered when it forwards a message to ``target``."""
    channel = await source.open_channel(target.peer_id, RING_SERVICE)
    answer, more = await request(channel, Forwarded(client.peer_id, message), *tensors)
    assert isinstance(answer, Refusal) and not more
    return channel, answer


async def until_done(worker: Worker, step_id: int) -> None:
    """Until a server has run step ``step_id`` and has sent all that it can."""
    session = worker.session
    await worker.until(lambda: session.rows.history.last_id >= step_id)
    await settle()
