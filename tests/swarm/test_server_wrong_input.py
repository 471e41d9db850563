"""What a client gets wrong is a typed refusal; the server lives on and every page comes back."""

import asyncio
import os

import msgspec
import pytest
import torch

from petals.errors import ERRORS_BY_CODE, PeerUnreachable, ProtocolError
from petals.server.config import ClientLimits
from petals.server.network.forwarding import MAX_SEGMENT_HOPS
from petals.server.policies import SchedulerConfig
from petals.server.session.session import MAX_REQUESTS
from petals.swarm.config import MIB
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES
from petals.testing.manual_clock import ManualClock, settle
from petals.types import ServerState
from petals.wire import frames
from petals.wire.frames import FrameKind
from petals.wire.handshake import DialedBack, Refusal
from petals.wire.header import NextHop
from petals.wire.passes import Forward, ForwardResult
from petals.wire.replies import Draining, SessionEnded, SessionOpened, StepResult
from petals.wire.requests import CloseSession, KeepSession, ReplayPart, ReplayRequest
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import FussySpan, Served, Talk, hold_compute, served


async def still_serves(swarm: Served) -> None:
    """A fresh client gets right answers, and afterwards every page is back."""
    talk, text = await swarm.talk(), states(7, seed=77)
    await talk.open()
    (output,) = await talk.step(0, [0], [text])
    assert_close(output, swarm.expected(text))
    await talk.close()
    await swarm.at_rest()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "another"}, "unknown_model"),
        ({"blocks": (9, 12)}, "blocks_not_served"),
        ({"blocks": (12, 15)}, "blocks_not_served"),
        ({"blocks": (12, 12)}, "protocol"),
        ({"adapter": "lora"}, "unknown_adapter"),
        ({"max_length": 257}, "length_exceeded"),
        ({"rows": 9}, "batch_too_large"),
        ({"rows": 8, "max_length": 256}, "request_too_large"),
        ({"dtype": "int64"}, "bad_input"),
        ({"dtype": "float3"}, "bad_input"),
    ],
)
async def test_openings_that_cannot_be(changes: dict[str, object], code: str) -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        # Even with patience: what can never be is refused at once.
        refusal = await talk.refused(talk.opening(**changes, alloc_timeout_seconds=100.0))
        assert refusal.code == code
        assert ERRORS_BY_CODE[code] is type(refusal.to_error("peer"))
        await still_serves(swarm)


def with_value(value: float) -> torch.Tensor:
    hidden = states(3)
    hidden[1, 5] = value
    return hidden


@pytest.mark.parametrize(
    ("hidden", "starts", "counts", "reorder", "code"),
    [
        (states(3)[:, :-1], (5,), (3,), None, "bad_input"),
        (states(3).long(), (5,), (3,), None, "bad_input"),
        (states(3)[None], (5,), (3,), None, "bad_input"),
        (states(4), (5,), (3,), None, "bad_input"),
        (with_value(float("nan")), (5,), (3,), None, "bad_input"),
        (with_value(float("inf")), (5,), (3,), None, "bad_input"),
        (with_value(float("-inf")), (2,), (3,), None, "bad_input"),
        (with_value(float("nan")), (5, 5), (3, 0), (0, 0), "bad_input"),
        (states(3), (6,), (3,), None, "session_gap"),
        (states(3), (5, 0), (3, 0), None, "bad_input"),
        (states(3), (), (3,), None, "bad_input"),
        (states(3), (5,), (3,), (1,), "bad_input"),
        (states(0), (), (), (), "bad_input"),
        (states(60), (5,), (60,), None, "length_exceeded"),
        (states(0), (5,) * 9, (0,) * 9, (0,) * 9, "batch_too_large"),
        (states(3), (2**31 - 1,), (3,), None, "session_gap"),
        (with_value(FussySpan.poison), (5,), (3,), None, "peer_failed"),
    ],
)
async def test_a_refused_step_leaves_the_session_as_it_was(
    hidden: torch.Tensor,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    reorder: tuple[int, ...] | None,
    code: str,
) -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(8)
        await talk.open()
        await talk.step(0, [0], [text[:5]])
        refusal = await talk.refused(talk.message(1, starts, counts, reorder), hidden)
        assert refusal.code == code
        assert refusal.hint
        swarm.pool.check_integrity()
        (output,) = await talk.step(2, [5], [text[5:]])
        assert_close(output, swarm.expected(text)[5:])
        await talk.close()
        await still_serves(swarm)


async def test_a_step_needs_exactly_one_tensor() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.open()
        message = talk.message(0, (0,), (3,))
        assert (await talk.refused(message)).code == "bad_input"
        assert (await talk.refused(message, states(3), states(3))).code == "bad_input"


async def test_a_step_may_not_be_larger_than_the_server_takes() -> None:
    async with served(num_tokens=4096) as swarm:
        talk = await swarm.talk()
        await talk.open(rows=3, max_length=256)
        message = talk.message(0, (0, 0, 0), (200, 200, 200))
        assert (await talk.refused(message, states(600))).code == "batch_too_large"


async def test_what_cannot_be_handed_on_comes_back() -> None:
    async with served() as swarm:
        talk, hops = await swarm.talk(), (NextHop("nobody", b"n" * 16),)
        await talk.open()
        message = talk.message(0, (0,), (3,), None, hops)
        answer, tensors = await talk.ask(message, states(3))
        assert isinstance(answer, StepResult) and answer.undelivered == hops
        assert_close(tensors[0], swarm.expected(states(3)))


HOP = NextHop("nobody", b"n" * 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"next_hops": (HOP,) * (MAX_SEGMENT_HOPS + 1)},
        {"next_hops": (HOP,), "timings": ((0.0, 0.0, 1),) * MAX_SEGMENT_HOPS},
        {"next_hops": (HOP,), "relayed": (False,) * MAX_SEGMENT_HOPS},
    ],
    ids=lambda changes: "-".join(changes),
)
async def test_a_segment_may_not_be_longer_than_a_message_can_report(changes) -> None:
    """The next hop would take the message for garbage and end the link of all sessions."""
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.open()
        message = msgspec.structs.replace(talk.message(0, (0,), (3,)), **changes)
        assert (await talk.refused(message, states(3))).code == "bad_input"
        await talk.step(0, [0], [states(3)])


async def test_a_server_does_not_forward_to_itself() -> None:
    async with served() as swarm:
        talk, other = await swarm.talk(), await swarm.talk()
        await talk.open()
        await other.open()
        for message, tensors in (
            (talk.message(0, (0,), (3,), None, (other.next_hop,)), (states(3),)),
            (ReplayRequest(talk.header(1), 1, (0,), (other.next_hop,)), ()),
            (ReplayPart(talk.header(2), 0, 1, (0,), (3,), None, (other.next_hop,)), (states(3),)),
        ):
            assert (await talk.refused(message, *tensors)).code == "bad_input"
        await talk.step(0, [0], [states(3)])


@pytest.mark.parametrize("hops", [(), (HOP, HOP)])
async def test_keys_and_values_go_to_one_hop(hops: tuple[NextHop, ...]) -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.open()
        request = ReplayRequest(talk.header(1), 1, (0,), hops, kv=True)
        assert (await talk.refused(request)).code == "bad_input"
        part = ReplayPart(talk.header(2), 0, 1, (0,), (3,), next_hops=(HOP,), kv=True)
        assert (await talk.refused(part, states(3))).code == "bad_input"


async def test_a_step_that_is_past_is_answered_from_memory_or_refused() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.open()
        await talk.step(5, [0], [states(2)])
        for message, hidden in (
            (talk.message(4, (2,), (1,)), states(1)),  # its id is past
            (talk.message(5, (1,), (1,)), states(1)),  # its id was run with other tokens
        ):
            assert (await talk.refused(message, hidden)).code == "session_gap"
        await talk.step(6, [2], [states(1)])


async def test_a_failed_reorder_is_not_applied_twice() -> None:
    async with served() as swarm:
        talk, texts = await swarm.talk(), [states(4, seed=1), states(4, seed=2)]
        await talk.open(rows=2)
        await talk.step(0, [0, 0], texts)
        poisoned = torch.full((2, WIDTH), FussySpan.poison)
        message = talk.message(1, (4, 4), (1, 1), (1, 0))
        assert (await talk.refused(message, poisoned)).code == "peer_failed"
        new = states(2, seed=3)
        outputs = await talk.step(1, [4, 4], [new[:1], new[1:]], reorder=(1, 0))
        for output, text, token in zip(outputs, reversed(texts), new):
            assert_close(output, swarm.expected(torch.cat([text, token[None]]))[4:])


async def test_one_that_fails_takes_nobody_with_it() -> None:
    async with served(scheduling=SchedulerConfig(max_batch_tokens=512)) as swarm:
        talks = [await swarm.talk() for _ in range(4)]
        texts = [states(9, seed=number) for number in range(4)]
        for talk, text in zip(talks, texts):
            await talk.open()
            await talk.step(0, [0], [text[:8]])
        swarm.runner.batches.clear()
        # The thread is held until all four steps wait, so that they share a batch.
        steps = []
        release = hold_compute(swarm)
        for number, (talk, text) in enumerate(zip(talks, texts)):
            hidden = torch.full((1, WIDTH), FussySpan.poison) if number == 2 else text[8:]
            steps.append(asyncio.create_task(talk.ask(talk.message(1, (8,), (1,)), hidden)))
        await settle()
        release()
        answers = await asyncio.gather(*steps)
        assert swarm.runner.batches[0] == 4
        for number, (message, tensors) in enumerate(answers):
            if number == 2:
                assert isinstance(message, Refusal) and message.code == "peer_failed"
            else:
                assert_close(tensors[0], swarm.expected(texts[number])[8:])
        (again,) = await talks[2].step(2, [8], [texts[2][8:]])
        assert_close(again, swarm.expected(texts[2])[8:])


@pytest.mark.parametrize(
    ("changes", "hidden", "code"),
    [
        ({"model": "another"}, states(6), "unknown_model"),
        ({"blocks": (0, 4)}, states(6), "blocks_not_served"),
        ({"adapter": "lora"}, states(6), "unknown_adapter"),
        ({"counts": (300,)}, states(300), "length_exceeded"),
        ({"counts": (200, 200, 200)}, states(600), "batch_too_large"),
        ({"counts": (1,) * 9}, states(9), "batch_too_large"),
        ({"counts": (7,)}, states(6), "bad_input"),
        ({}, states(6).long(), "bad_input"),
        ({}, states(6)[:, :-1], "bad_input"),
        ({}, states(6) / 0, "bad_input"),
        ({}, torch.full((6, WIDTH), FussySpan.poison), "peer_failed"),
    ],
)
async def test_forwards_that_cannot_be(
    changes: dict[str, object], hidden: torch.Tensor, code: str
) -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        fields: dict[str, object] = {"model": "tiny", "blocks": (10, 14), "counts": (6,)}
        assert (await talk.refused(Forward(**{**fields, **changes}), hidden)).code == code
        answer, _ = await talk.ask(Forward(**fields), states(6))
        assert isinstance(answer, ForwardResult)
        await still_serves(swarm)


async def test_there_is_no_session_but_those_opened() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        refusal = await talk.refused(talk.message(0, (0,), (3,)), states(3))
        assert refusal.code == "session_closed"
        await talk.channel.send(KeepSession(talk.header()))
        answer, _ = await talk.ask(CloseSession(talk.header()))
        assert isinstance(answer, SessionEnded)
        await still_serves(swarm)


async def test_nobody_reaches_anothers_session() -> None:
    async with served() as swarm:
        mine, theirs = await swarm.talk(), await swarm.talk(swarm.stranger)
        theirs.session_id = mine.session_id
        await mine.open()
        refusal = await theirs.refused(theirs.message(0, (0,), (3,)), states(3))
        assert refusal.code == "session_closed"
        await theirs.ask(CloseSession(theirs.header()))
        assert len(swarm.service.sessions) == 1


async def test_messages_of_other_services_end_the_channel() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        refusal = await talk.refused(DialedBack(True, 0.0))
        assert refusal.code == "protocol"
        with pytest.raises(PeerUnreachable):
            await talk.channel.receive(5.0)
        await still_serves(swarm)


@pytest.mark.parametrize(
    "garbage",
    [
        os.urandom(64),
        frames.encode_header(FrameKind.MESSAGE, 1 << 30),
        frames.encode_frame(FrameKind.MESSAGE, os.urandom(100)),
        frames.encode_frame(FrameKind.CHUNK, b"x" * 100),
    ],
    ids=["random", "too long", "no message", "a chunk of nothing"],
)
async def test_garbage_costs_the_channel_and_nothing_else(garbage: bytes) -> None:
    async with served(door=ClientLimits(lease_seconds=0.05)) as swarm:
        talk = await swarm.talk()
        await talk.open()
        await talk.step(0, [0], [states(3)])
        talk.channel._stream.write(garbage)
        async with asyncio.timeout(10):
            with pytest.raises((ProtocolError, PeerUnreachable)):
                while True:
                    await talk.channel.receive()
            while len(swarm.service.sessions):
                await swarm.executor.call(lambda: None)
        await still_serves(swarm)


async def test_leaving_servers_open_nothing_and_finish_what_runs() -> None:
    async with served() as swarm:
        talk, late = await swarm.talk(), await swarm.talk()
        await talk.open()
        swarm.service.state = ServerState.DRAINING
        assert (await late.refused(late.opening())).code == "peer_busy"
        await talk.step(0, [0], [states(3)])
        await swarm.service.sessions.end_all("leaving")
        message, _ = await talk.channel.receive(5.0)
        assert isinstance(message, SessionEnded) and message.reason == "leaving"
        await swarm.at_rest()


async def test_a_peer_has_only_its_share_of_sessions() -> None:
    async with served(door=ClientLimits(max_sessions_per_peer=2)) as swarm:
        talk = await swarm.talk()
        opened = []
        for _ in range(3):
            talk.session_id = swarm.new_id()
            opened.append((await talk.ask(talk.opening()))[0])
        assert [isinstance(answer, SessionOpened) for answer in opened] == [True, True, False]
        assert isinstance(opened[2], Refusal) and opened[2].code == "peer_busy"
        other = await swarm.talk(swarm.stranger)
        await other.open()


async def test_a_peer_has_only_its_share_of_waiting_bytes() -> None:
    limit = 4 * WIDTH * 10
    async with served(door=ClientLimits(max_bytes_per_peer=limit)) as swarm:
        talk = await swarm.talk()
        await talk.open()
        release = hold_compute(swarm)
        for step_id, (start, count) in enumerate([(0, 6), (6, 6)]):
            message = talk.message(step_id, (start,), (count,))
            await talk.channel.send(message, (states(count),))
        answer, _ = await talk.channel.receive(5.0)
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.header) == ("peer_busy", talk.header(1))
        release()
        answer, _ = await talk.channel.receive(5.0)
        assert isinstance(answer, StepResult) and answer.header == talk.header(0)


async def test_too_many_requests_of_a_session_are_refused() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.open(max_length=256)
        release = hold_compute(swarm)
        for step_id in range(MAX_REQUESTS + 1):
            await talk.channel.send(talk.message(step_id, (step_id,), (1,)), (states(1),))
        answer, _ = await talk.channel.receive(5.0)
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.header) == ("peer_busy", talk.header(MAX_REQUESTS))
        release()
        answers = [(await talk.channel.receive(5.0))[0] for _ in range(MAX_REQUESTS)]
        assert all(isinstance(answer, StepResult) for answer in answers)


async def test_closing_gives_up_what_is_under_way() -> None:
    async with served(scheduling=SchedulerConfig(max_batch_tokens=16)) as swarm:
        talk = await swarm.talk()
        await talk.open(max_length=200)
        release = hold_compute(swarm)
        await talk.channel.send(talk.message(0, (0,), (150,)), (states(150),))
        await settle()
        closing = asyncio.create_task(talk.close())
        await settle()
        release()
        await closing
        await still_serves(swarm)


NUM_ANSWERS = WINDOW_BYTES // states(512).nbytes + 3


class TestClientsThatGiveNoCredit:
    """They answer pings and read nothing."""

    LIMITS = FailoverConfig(send_seconds=1.0)

    async def stuck(self, swarm: Served) -> Talk:
        """A client whose steps are run and whose last answers wait for credit."""
        talk, worker = await swarm.talk(), swarm.workers[0]
        await talk.open(rows=2, max_length=256)
        for step_id in range(NUM_ANSWERS):
            message = talk.message(step_id, (0, 0), (256, 256))
            await talk.channel.send(message, (states(512),))
            await worker.until(lambda done=step_id: worker.session.rows.history.last_id == done)
        await settle()
        assert not worker.session.is_idle
        return talk

    async def test_they_lose_the_channel_and_what_waits_for_it(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, failover=self.LIMITS, log_bytes=64 * MIB) as swarm:
            talk, worker = await self.stuck(swarm), swarm.workers[0]
            num_batches = worker.num_batches
            await clock.advance(3.0)
            await worker.check()
            assert not worker.session.has_client
            # The session waits for its client, which finds the answers on a new channel.
            talk.channel = (await swarm.talk()).channel
            outputs = await talk.step(NUM_ANSWERS - 1, [0, 0], states(512).split(256))
            for output, text in zip(outputs, states(512).split(256)):
                assert_close(output, swarm.expected(text))
            assert worker.num_batches == num_batches

    async def test_they_hold_up_no_news_of_others(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, failover=self.LIMITS, log_bytes=64 * MIB) as swarm:
            await self.stuck(swarm)
            other = await swarm.talk(swarm.stranger)
            await other.open()
            draining = asyncio.create_task(swarm.service.sessions.drain(5.0))
            await settle()
            message, _ = await other.channel.receive(5.0)
            assert isinstance(message, Draining)
            await swarm.service.sessions.end_all("leaving")
            message, _ = await other.channel.receive(5.0)
            assert isinstance(message, SessionEnded)
            await clock.advance(6.0)
            await draining


class TestFullCache:
    """Room for four sessions of 64 tokens."""

    async def full(self, swarm: Served) -> Talk:
        talk = await swarm.talk()
        await talk.open(rows=4)
        return talk

    async def test_without_patience_it_says_so_at_once(self) -> None:
        async with served(num_tokens=256) as swarm:
            await self.full(swarm)
            late = await swarm.talk(swarm.stranger)
            assert (await late.refused(late.opening())).code == "cache_full"

    async def test_patience_ends(self) -> None:
        clock = ManualClock()
        async with served(num_tokens=256, clock=clock) as swarm:
            await self.full(swarm)
            late = await swarm.talk(swarm.stranger)
            asking = asyncio.create_task(late.ask(late.opening(alloc_timeout_seconds=2.0)))
            await _until_waiting(swarm, 1)
            await clock.advance(1.9)
            assert not asking.done()
            await clock.advance(0.2)
            answer, _ = await asking
            assert isinstance(answer, Refusal) and answer.code == "cache_full"
            assert ERRORS_BY_CODE[answer.code].retryable

    async def test_patience_is_capped(self) -> None:
        clock = ManualClock()
        door = ClientLimits(max_alloc_seconds=1.0)
        async with served(num_tokens=256, door=door, clock=clock) as swarm:
            await self.full(swarm)
            late = await swarm.talk(swarm.stranger)
            asking = asyncio.create_task(late.ask(late.opening(alloc_timeout_seconds=1e6)))
            await _until_waiting(swarm, 1)
            await clock.advance(1.1)
            assert (await asking)[0].code == "cache_full"

    async def test_first_come_first_served(self) -> None:
        async with served(num_tokens=256) as swarm:
            first = await self.full(swarm)
            order: list[int] = []

            async def wait(number: int, rows: int) -> Talk:
                talk = await swarm.talk()
                await talk.open(rows=rows, alloc_timeout_seconds=20.0)
                order.append(number)
                return talk

            waiting = []
            for number, rows in ((1, 4), (2, 1), (3, 1)):
                waiting.append(asyncio.create_task(wait(number, rows)))
                await _until_waiting(swarm, number)
            late = await swarm.talk(swarm.stranger)
            await first.close()
            big = await waiting[0]
            # Nobody overtakes those who wait, not even with a request that would fit.
            assert (await late.refused(late.opening())).code == "cache_full"
            await big.close()
            rest = [await task for task in waiting[1:]]
            assert order == [1, 2, 3]
            for talk in rest:
                await talk.close()
            await still_serves(swarm)

    async def test_a_client_that_stops_waiting_keeps_nothing(self) -> None:
        async with served(num_tokens=256) as swarm:
            first, late = await self.full(swarm), await swarm.talk()
            await late.channel.send(late.opening(alloc_timeout_seconds=100.0))
            await _until_waiting(swarm, 1)
            await late.channel.close()
            await _until_waiting(swarm, 0)
            await first.close()
            await still_serves(swarm)

    async def test_a_session_that_grows_may_run_out(self) -> None:
        async with served(num_tokens=512) as swarm:
            other, talk = await swarm.talk(), await swarm.talk()
            await other.open(max_length=256)
            await talk.open(rows=2, max_length=0)
            message = talk.message(0, (0, 0), (5, 5))
            assert (await talk.refused(message, states(10))).code == "cache_full"
            await other.close()
            answer, _ = await talk.ask(message, states(10))
            assert isinstance(answer, StepResult)
            await talk.close()
            await still_serves(swarm)


class TestLease:
    """A client that says nothing keeps its sessions for the lease, and no longer."""

    async def test_silence_ends_a_session(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, door=ClientLimits(lease_seconds=2.0)) as swarm:
            talk = await swarm.talk()
            assert (await talk.open()).lease_seconds == 2.0
            await clock.advance(1.5)
            assert len(swarm.service.sessions) == 1
            await clock.advance(1.5)
            message, _ = await talk.channel.receive()
            assert isinstance(message, SessionEnded)
            await swarm.at_rest()

    async def test_signs_of_life_keep_it(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, door=ClientLimits(lease_seconds=2.0)) as swarm:
            talk = await swarm.talk()
            await talk.open()
            for _ in range(5):
                await talk.channel.send(KeepSession(talk.header()))
                await clock.advance(1.5)
            assert len(swarm.service.sessions) == 1

    async def test_a_vanished_client_is_forgotten(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, door=ClientLimits(lease_seconds=2.0)) as swarm:
            talk = await swarm.talk()
            await talk.open()
            swarm.net.kill(swarm.client.peer_id)
            await clock.advance(1.0)
            assert len(swarm.service.sessions) == 1
            await clock.advance(2.0)
            await swarm.at_rest()

    async def test_a_running_step_is_a_sign_of_life(self) -> None:
        clock = ManualClock()
        async with served(clock=clock, door=ClientLimits(lease_seconds=2.0)) as swarm:
            talk = await swarm.talk()
            await talk.open()
            release = hold_compute(swarm)
            await talk.channel.send(talk.message(0, (0,), (3,)), (states(3),))
            await clock.advance(5.0)
            assert len(swarm.service.sessions) == 1
            release()
            message, _ = await talk.channel.receive()
            assert isinstance(message, StepResult)


async def _until_waiting(swarm: Served, number: int) -> None:
    """Let things happen until so many clients wait for cache."""
    async with asyncio.timeout(10):
        while len(swarm.service.kv_queue) != number:
            await swarm.executor.call(lambda: None)
