"""Sessions of a server over a network in memory: the numbers are the model's in any company."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from petals.errors import PeerFailed
from petals.server.config import ClientLimits
from petals.server.policies import SchedulerConfig
from petals.swarm.failover_config import FailoverConfig
from petals.testing.manual_clock import ManualClock, settle
from petals.wire.header import RequestHeader
from petals.wire.replies import Info, SessionOpened, StepResult
from petals.wire.requests import BeginEpoch, GetInfo, KeepSession, ReplayPart, ReplayRequest
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import FussySpan, Worker, served


@pytest.mark.parametrize("model", ["llama", "bloom", "mistral", "qwen3_next"])
async def test_prefill_and_decode_equal_the_whole_model(model: str) -> None:
    async with served(model) as swarm:
        talk, text = await swarm.talk(), states(20)
        await talk.open()
        (first,) = await talk.step(0, [0], [text[:15]])
        rest = [(await talk.step(i, [14 + i], [text[14 + i : 15 + i]]))[0] for i in range(1, 6)]
        assert_close(torch.cat([first, *rest]), swarm.expected(text))
        await talk.close()
        await swarm.at_rest()


@pytest.mark.parametrize("model", ["llama", "bloom"])
async def test_sessions_share_batches_and_do_not_notice(model: str) -> None:
    async with served(model, scheduling=SchedulerConfig(max_batch_tokens=64)) as swarm:

        async def one(number: int) -> None:
            talk, text = await swarm.talk(), states(24 + number, seed=number)
            await talk.open()
            cut = 8 + number
            outputs = await talk.step(0, [0], [text[:cut]])
            for i in range(cut, len(text)):
                outputs += await talk.step(i, [i], [text[i : i + 1]])
            assert_close(torch.cat(outputs), swarm.expected(text))
            await talk.close()

        await asyncio.gather(*(one(number) for number in range(6)))
        assert max(swarm.runner.batches) > 1
        await swarm.at_rest()


async def test_a_long_prompt_runs_in_pieces_that_the_client_does_not_see() -> None:
    async with served(scheduling=SchedulerConfig(max_batch_tokens=16)) as swarm:
        talk, texts = await swarm.talk(), [states(50, seed=1), states(37, seed=2)]
        await talk.open(rows=2)
        outputs = await talk.step(0, [0, 0], texts)
        assert len(swarm.runner.batches) >= 6
        for output, text in zip(outputs, texts):
            assert_close(output, swarm.expected(text))


async def test_a_step_that_is_repeated_during_it_and_after_it_is_not_run_again() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(5)
        await talk.open()
        message = talk.message(0, (0,), (5,))
        for _ in range(3):
            await talk.channel.send(message, (text,))
        answers = [await talk.channel.receive(20.0) for _ in range(3)]
        answers.append(await talk.ask(message, text))
        assert_close(answers[0][1][0], swarm.expected(text))
        assert all(torch.equal(tensors[0], answers[0][1][0]) for _, tensors in answers)
        assert len(swarm.runner.batches) == 1


async def test_states_travel_in_the_dtype_of_the_session() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(4).bfloat16()
        await talk.open(dtype="bfloat16")
        (output,) = await talk.step(0, [0], [text])
        assert output.dtype == torch.bfloat16
        expected = swarm.expected(text.float())
        assert (output.float() - expected).abs().max() <= 1e-2 * expected.abs().max()


async def test_replies_go_to_the_channel_that_was_opened_last() -> None:
    """What a client has sent on a channel that it has left may be read late."""
    async with served() as swarm:
        talk, text = await swarm.talk(), states(6)
        await talk.open()
        old, talk.channel = talk.channel, (await swarm.talk()).channel
        await talk.channel.send(KeepSession(talk.header()))
        await talk.channel.ping()
        await old.send(talk.message(0, (0,), (6,)), (text,))
        answer, (output,) = await talk.channel.receive(20.0)
        assert isinstance(answer, StepResult)
        assert_close(output, swarm.expected(text))


async def test_two_clients_may_choose_the_same_id() -> None:
    async with served() as swarm:
        texts = [states(5, seed=1), states(5, seed=2)]
        talks = [await swarm.talk(), await swarm.talk(swarm.stranger)]
        talks[1].session_id = talks[0].session_id
        for talk in talks:
            await talk.open()
        for talk, text in zip(talks, texts):
            (output,) = await talk.step(0, [0], [text])
            assert_close(output, swarm.expected(text))


class TestOpening:
    async def test_the_same_request_is_answered_again(self) -> None:
        async with served() as swarm:
            talk, text = await swarm.talk(), states(3)
            first = await talk.open()
            await talk.step(0, [0], [text])
            assert await talk.open() == first
            assert len(swarm.service.sessions) == 1
            (again,) = await talk.step(1, [3], [text])
            assert_close(again, swarm.expected(torch.cat([text, text]))[3:])

    @pytest.mark.parametrize("num_channels", [1, 2])
    async def test_two_that_come_at_the_same_time_reserve_once(self, num_channels: int) -> None:
        async with served(num_tokens=256) as swarm:
            talk, other = await swarm.talk(), await swarm.talk()
            await other.open(rows=4)
            channels = [talk.channel, (await swarm.talk()).channel][-num_channels:]
            for channel in (channels * 2)[:2]:
                await channel.send(talk.opening(alloc_timeout_seconds=20.0))
                await channel.ping()
            await other.close()
            answers = [(await channel.receive(20.0))[0] for channel in (channels * 2)[:2]]
            assert all(isinstance(answer, SessionOpened) for answer in answers)
            assert answers[0] == answers[1]
            assert len(swarm.service.sessions) == 1

    async def test_a_repetition_reserves_if_its_client_has_left_the_first_channel(self) -> None:
        async with served(num_tokens=256) as swarm:
            talk, again, other = [await swarm.talk() for _ in range(3)]
            again.session_id = talk.session_id
            await other.open(rows=4)
            await talk.channel.send(talk.opening(alloc_timeout_seconds=20.0))
            await talk.channel.ping()
            await again.channel.send(again.opening(alloc_timeout_seconds=20.0))
            await again.channel.ping()
            await talk.channel.close()
            await other.close()
            assert isinstance((await again.channel.receive(20.0))[0], SessionOpened)
            await again.close()
            await swarm.at_rest()

    @pytest.mark.parametrize(
        "changes",
        [
            {"rows": 2},
            {"max_length": 63},
            {"blocks": (10, 13)},
            {"dtype": "bfloat16"},
            {"sources": ("somebody",)},
            {"header": RequestHeader(bytes(16), 1)},
            {"header": RequestHeader(bytes(16), 0, 7)},
        ],
        ids=lambda changes: "-".join(changes),
    )
    async def test_an_id_that_is_taken_is_refused_to_other_contents(self, changes) -> None:
        async with served() as swarm:
            talk = await swarm.talk()
            await talk.open()
            assert (await talk.refused(talk.opening(**changes))).code == "bad_input"
            await talk.step(0, [0], [states(3)])
            assert len(swarm.service.sessions) == 1

    async def test_one_reservation_is_closed_and_not_the_next(self) -> None:
        """A client gives up a reservation while another of its tasks has begun anew, in a newer
        epoch and for the same blocks.
        """
        async with served() as swarm:
            old, new, text = await swarm.talk(), await swarm.talk(), states(6)
            await old.open()
            new.epoch = 1
            await new.open()
            await old.close()
            (output,) = await new.step(0, [0], [text])
            assert_close(output, swarm.expected(text))
            await new.close()
            await swarm.at_rest()


class TestEpochs:
    """Requests of the client itself; those of other servers are in test_server_ring."""

    async def test_requests_of_a_newer_epoch_than_the_client_has_begun_are_refused(self) -> None:
        async with served() as swarm:
            talk, text = await swarm.talk(), states(4)
            await talk.open()
            talk.epoch = 1
            for message, tensors in (
                (talk.message(0, (0,), (4,)), (text,)),
                (ReplayRequest(talk.header(1), 0, (0,), ()), ()),
                (ReplayPart(talk.header(2), 0, 0, (0,), (4,)), (text,)),
            ):
                assert (await talk.refused(message, *tensors)).code == "session_gap"
            session = swarm.workers[0].session
            assert (session.epoch, session.rows.lengths) == (0, (0,))
            await talk.channel.send(BeginEpoch(talk.header(), ()))
            (output,) = await talk.step(0, [0], [text])
            assert_close(output, swarm.expected(text))

    async def test_a_refusal_of_an_older_epoch_is_not_sent(self) -> None:
        """It would have the id of a step that the client repeats in the new epoch."""
        async with served() as swarm:
            talk, text = await swarm.talk(), states(6)
            await talk.open()
            await talk.step(0, [0], [text[:5]])
            release = swarm.workers[0].hold()
            poisoned = torch.full((1, WIDTH), FussySpan.poison)
            await talk.channel.send(talk.message(1, (5,), (1,)), (poisoned,))
            await settle()  # it is with the executor now
            talk.epoch = 1
            await talk.channel.send(BeginEpoch(talk.header(), ()))
            await talk.channel.send(talk.message(1, (5,), (1,)), (text[5:],))
            await talk.channel.ping()
            release()
            answer, (output,) = await talk.channel.receive(20.0)
            assert isinstance(answer, StepResult)
            assert answer.header == talk.header(1)
            assert_close(output, swarm.expected(text)[5:])


WRONG_BOOKS = {
    "fewer keys and values": lambda worker: worker.session.rows.kv.truncate(0, 2),
    "fewer outputs": lambda worker: worker.session.rows.outputs.cut((2,)),
    "shorter rows": lambda worker: setattr(worker.session.rows, "lengths", (2,)),
    "a forgotten step": lambda worker: setattr(worker.session.rows.history, "last_id", -1),
    "memory of no session": lambda worker: worker.pool.reserve(1, 16, worker.blocks),
    "a byte too many": lambda worker: setattr(worker.logs, "used_bytes", 1),
}


@pytest.mark.parametrize("spoil", WRONG_BOOKS.values(), ids=WRONG_BOOKS)
async def test_books_that_are_wrong_are_found(spoil: Callable[[Worker], None]) -> None:
    with pytest.raises(AssertionError):
        async with served() as swarm:
            talk, worker = await swarm.talk(), swarm.workers[0]
            await talk.open()
            await talk.step(0, [0], [states(5)])
            await worker.check()
            spoil(worker)
            with pytest.raises(AssertionError):
                await worker.check()
            # ... and again when the scene ends.


async def test_a_server_that_checks_its_books_ends_if_they_are_wrong() -> None:
    clock = ManualClock()
    with pytest.raises(PeerFailed):
        async with served(clock=clock) as swarm:
            talk, worker = await swarm.talk(), swarm.workers[0]
            await talk.open()
            await talk.step(0, [0], [states(5)])
            WRONG_BOOKS["shorter rows"](worker)
            await clock.advance(ClientLimits().lease_seconds / FailoverConfig().reaps_per_lease)
            with pytest.raises(PeerFailed, match="compute thread"):
                await worker.until(lambda: False)
            assert (
                await talk.refused(talk.message(1, (2,), (1,)), states(1))
            ).code == "peer_failed"


async def test_a_session_without_a_length_grows() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(20)
        opened = await talk.open(max_length=0)
        assert opened.max_length == 256
        assert swarm.pool.reserved_bytes == 0
        outputs = await talk.step(0, [0], [text[:19]])
        outputs += await talk.step(1, [19], [text[19:]])
        assert_close(torch.cat(outputs), swarm.expected(text))
        await talk.close()
        await swarm.at_rest()


async def test_info_says_how_it_is_now() -> None:
    async with served(num_tokens=512) as swarm:
        talk = await swarm.talk()
        await talk.open(max_length=256)
        info, _ = await talk.ask(GetInfo())
        assert isinstance(info, Info)
        assert (info.model, info.blocks, info.state) == ("tiny", (10, 14), "online")
        assert (info.num_sessions, info.tokens_free) == (1, 4 * 256)
        assert (info.max_length, info.hidden_size) == (256, WIDTH)
