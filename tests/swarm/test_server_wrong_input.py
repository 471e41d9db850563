"""What a client gets wrong is a typed refusal; the server lives on and every page comes back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import torch

from petals.errors import ERRORS_BY_CODE, PeerUnreachable
from petals.server.config import ClientLimits
from petals.server.network.forwarding import MAX_SEGMENT_HOPS
from petals.server.session.session import MAX_REQUESTS
from petals.swarm.config import MIB
from petals.swarm.failover_config import FailoverConfig
from petals.swarm.rpc.receive_buffer import WINDOW_BYTES
from petals.testing.manual_clock import ManualClock, settle
from petals.wire.handshake import DialedBack, Refusal
from petals.wire.header import NextHop
from petals.wire.passes import Forward, ForwardResult
from petals.wire.replies import Draining, SessionEnded, SessionOpened, StepResult
from petals.wire.requests import (
    CloseSession,
    KeepSession,
    OpenSession,
    ReplayPart,
    ReplayRequest,
    Step,
)
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import FussySpan, Served, served
from support.talk import Talk


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
    ("tensors", "starts", "counts", "reorder", "code"),
    [
        ((states(3)[:, :-1],), (5,), (3,), None, "bad_input"),
        ((states(3).long(),), (5,), (3,), None, "bad_input"),
        ((states(3)[None],), (5,), (3,), None, "bad_input"),
        ((states(4),), (5,), (3,), None, "bad_input"),
        ((with_value(float("nan")),), (5,), (3,), None, "bad_input"),
        ((with_value(float("inf")),), (5,), (3,), None, "bad_input"),
        ((with_value(float("-inf")),), (2,), (3,), None, "bad_input"),
        ((with_value(float("nan")),), (5, 5), (3, 0), (0, 0), "bad_input"),
        ((), (5,), (3,), None, "bad_input"),
        ((states(3), states(3)), (5,), (3,), None, "bad_input"),
        ((states(3),), (6,), (3,), None, "session_gap"),
        ((states(3),), (5, 0), (3, 0), None, "bad_input"),
        ((states(3),), (), (3,), None, "bad_input"),
        ((states(3),), (5,), (3,), (1,), "bad_input"),
        ((states(0),), (), (), (), "bad_input"),
        ((states(252),), (5,), (252,), None, "length_exceeded"),
        ((states(600),), (5, 5, 5), (200, 200, 200), (0, 0, 0), "batch_too_large"),
        ((states(0),), (5,) * 9, (0,) * 9, (0,) * 9, "batch_too_large"),
        ((states(3),), (2**31 - 1,), (3,), None, "session_gap"),
        ((with_value(FussySpan.poison),), (5,), (3,), None, "peer_failed"),
    ],
)
async def test_a_refused_step_leaves_the_session_as_it_was(
    tensors: tuple[torch.Tensor, ...],
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    reorder: tuple[int, ...] | None,
    code: str,
) -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(8)
        await talk.open(max_length=256)
        await talk.step(0, [0], [text[:5]])
        refusal = await talk.refused(talk.message(1, starts, counts, reorder), *tensors)
        assert refusal.code == code
        assert refusal.hint
        swarm.pool.check_integrity()
        (output,) = await talk.step(2, [5], [text[5:]])
        assert_close(output, swarm.expected(text)[5:])
        await talk.close()
        await still_serves(swarm)


HOP, ITSELF = NextHop("nobody", b"n" * 16), NextHop("itself", b"i" * 16)
"""``ITSELF`` stands for another session at the same server."""

REPLAY = partial(ReplayRequest, before_step=1, lengths=(0,))
PART = partial(ReplayPart, index=0, before_step=1, starts=(0,), counts=(3,), reorder=None)
STEP = partial(Step, starts=(0,), counts=(3,))
TIMING = (0.0, 0.0, 1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # The next hop would take the message for garbage and end the link of all sessions.
        (STEP, {"next_hops": (HOP,) * (MAX_SEGMENT_HOPS + 1)}),
        (STEP, {"next_hops": (HOP,), "timings": (TIMING,) * MAX_SEGMENT_HOPS}),
        (STEP, {"next_hops": (HOP,), "relayed": (False,) * MAX_SEGMENT_HOPS}),
        # A server does not forward to itself.
        (STEP, {"next_hops": (ITSELF,)}),
        (REPLAY, {"next_hops": (ITSELF,)}),
        (PART, {"next_hops": (ITSELF,)}),
        # Keys and values go to exactly one hop.
        (REPLAY, {"next_hops": (), "kv": True}),
        (REPLAY, {"next_hops": (HOP, HOP), "kv": True}),
        (PART, {"next_hops": (HOP,), "kv": True}),
    ],
)
async def test_next_hops_that_cannot_be(
    kind: Callable[..., Step | ReplayRequest | ReplayPart], changes: dict[str, object]
) -> None:
    async with served() as swarm:
        talk, other = await swarm.talk(), await swarm.talk()
        await talk.open()
        await other.open()
        if changes["next_hops"] == (ITSELF,):
            changes = {"next_hops": (other.next_hop,)}
        tensors = () if kind is REPLAY else (states(3),)
        refusal = await talk.refused(kind(talk.header(1), **changes), *tensors)
        assert refusal.code == "bad_input"
        await talk.step(1, [0], [states(3)])


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


async def test_there_is_no_session_but_those_that_the_same_client_has_opened() -> None:
    async with served() as swarm:
        mine, theirs = await swarm.talk(), await swarm.talk(swarm.stranger)
        theirs.session_id = mine.session_id
        await mine.open()
        absent = await swarm.talk()
        for talk in (theirs, absent):
            refusal = await talk.refused(talk.message(0, (0,), (3,)), states(3))
            assert refusal.code == "session_closed"
            answer, _ = await talk.ask(CloseSession(talk.header()))
            assert isinstance(answer, SessionEnded)
        await mine.step(0, [0], [states(3)])
        # The id is free for another client all the same.
        await theirs.open()
        assert len(swarm.service.sessions) == 2


async def test_messages_of_other_services_end_the_channel() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        refusal = await talk.refused(DialedBack(True, 0.0))
        assert refusal.code == "protocol"
        with pytest.raises(PeerUnreachable):
            await talk.channel.receive(5.0)
        await still_serves(swarm)


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
        release = swarm.workers[0].hold()
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
        release = swarm.workers[0].hold()
        for step_id in range(MAX_REQUESTS + 1):
            await talk.channel.send(talk.message(step_id, (step_id,), (1,)), (states(1),))
        answer, _ = await talk.channel.receive(5.0)
        assert isinstance(answer, Refusal)
        assert (answer.code, answer.header) == ("peer_busy", talk.header(MAX_REQUESTS))
        release()
        answers = [(await talk.channel.receive(5.0))[0] for _ in range(MAX_REQUESTS)]
        assert all(isinstance(answer, StepResult) for answer in answers)


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
    """Room for four sessions of 64 tokens. Whose turn it is: tests/unit/server/admission."""

    async def full(self, swarm: Served) -> Talk:
        talk = await swarm.talk()
        await talk.open(rows=4)
        return talk

    async def test_without_patience_it_says_so_at_once(self) -> None:
        async with served(num_tokens=256) as swarm:
            await self.full(swarm)
            late = await swarm.talk(swarm.stranger)
            assert (await late.refused(late.opening())).code == "cache_full"

    @pytest.mark.parametrize("asked_seconds", [1.0, 1e6])
    async def test_patience_ends_and_is_capped(self, asked_seconds: float) -> None:
        clock, door = ManualClock(), ClientLimits(max_alloc_seconds=1.0)
        async with served(num_tokens=256, door=door, clock=clock) as swarm:
            await self.full(swarm)
            late = await swarm.talk(swarm.stranger)
            opening = late.opening(alloc_timeout_seconds=asked_seconds)
            asking = asyncio.create_task(late.ask(opening))
            await swarm.workers[0].faults.until_asked(OpenSession, 2)
            await settle()
            await clock.advance(0.9)
            assert not asking.done()
            await clock.advance(0.2)
            answer, _ = await asking
            assert isinstance(answer, Refusal) and answer.code == "cache_full"
            assert ERRORS_BY_CODE[answer.code].retryable

    async def test_a_client_that_stops_waiting_keeps_nothing(self) -> None:
        async with served(num_tokens=256) as swarm:
            first, late = await self.full(swarm), await swarm.talk()
            await late.channel.send(late.opening(alloc_timeout_seconds=100.0))
            await swarm.workers[0].faults.until_asked(OpenSession, 2)
            await late.channel.close()
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
    """A client that says nothing keeps its sessions for the lease of 2 s, and no longer."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def swarm(self, clock: ManualClock) -> AsyncIterator[Served]:
        async with served(clock=clock, door=ClientLimits(lease_seconds=2.0)) as swarm:
            yield swarm

    @pytest.fixture
    async def talk(self, swarm: Served) -> Talk:
        talk = await swarm.talk()
        assert (await talk.open()).lease_seconds == 2.0
        return talk

    @pytest.mark.parametrize("is_gone", [False, True], ids=["silent", "gone"])
    async def test_silence_ends_a_session(
        self, clock: ManualClock, swarm: Served, talk: Talk, is_gone: bool
    ) -> None:
        if is_gone:
            swarm.net.kill(swarm.client.peer_id)
        await clock.advance(1.5)
        assert len(swarm.service.sessions) == 1
        await clock.advance(1.5)
        await swarm.at_rest()
        if not is_gone:
            message, _ = await talk.channel.receive()
            assert isinstance(message, SessionEnded)

    async def test_signs_of_life_keep_it(
        self, clock: ManualClock, swarm: Served, talk: Talk
    ) -> None:
        for _ in range(5):
            await talk.channel.send(KeepSession(talk.header()))
            await clock.advance(1.5)
        assert len(swarm.service.sessions) == 1

    async def test_a_running_step_is_a_sign_of_life(
        self, clock: ManualClock, swarm: Served, talk: Talk
    ) -> None:
        release = swarm.workers[0].hold()
        await talk.channel.send(talk.message(0, (0,), (3,)), (states(3),))
        await clock.advance(5.0)
        assert len(swarm.service.sessions) == 1
        release()
        message, _ = await talk.channel.receive()
        assert isinstance(message, StepResult)
