"""Sessions of a server over a network in memory: the numbers are the model's in any company."""

import asyncio

import pytest
import torch

from petals.server.policies import SchedulerConfig
from petals.types import BlockSpan
from petals.wire.passes import Forward, ForwardResult
from petals.wire.replies import Info, SessionEnded, StepResult
from petals.wire.requests import CloseSession, GetInfo, Step
from support.service import assert_close, served, states


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
            talk.session_id = bytes([number]) * 16
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


async def test_a_row_rolls_back_when_its_step_begins_earlier() -> None:
    async with served() as swarm:
        talk, first, second = await swarm.talk(), states(12), states(12, seed=1)
        await talk.open(rows=2)
        await talk.step(0, [0, 0], [first, second])
        other = states(3, seed=9)
        outputs = await talk.step(1, [5, 12], [other, states(0)])
        assert_close(outputs[0], swarm.expected(torch.cat([first[:5], other]))[5:])
        # The second row was left alone.
        outputs = await talk.step(2, [8, 12], [states(0), other])
        assert_close(outputs[1], swarm.expected(torch.cat([second, other]))[12:])


async def test_rows_are_reordered_before_they_go_on() -> None:
    async with served() as swarm:
        talk, texts = await swarm.talk(), [states(6, seed=i) for i in range(3)]
        await talk.open(rows=3)
        await talk.step(0, [0, 0, 0], texts)
        new = [states(1, seed=10 + i) for i in range(4)]
        outputs = await talk.step(1, [6, 6, 6, 4], new, reorder=(2, 0, 2, 1))
        for output, old, start, token in zip(outputs, (2, 0, 2, 1), (6, 6, 6, 4), new):
            whole = swarm.expected(torch.cat([texts[old][:start], token]))
            assert_close(output, whole[start:])
        swarm.pool.check_integrity()
        await talk.close()
        await swarm.at_rest()


async def test_a_zero_token_step_only_moves_positions() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(8)
        await talk.open()
        await talk.step(0, [0], [text])
        (output,) = await talk.step(1, [4], [text[:0]])
        assert output.shape == (0, text.shape[1])
        (output,) = await talk.step(2, [4], [text[4:]])
        assert_close(output, swarm.expected(text)[4:])


async def test_a_repeated_step_is_answered_and_not_run_again() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(5)
        await talk.open()
        (first,) = await talk.step(0, [0], [text])
        num_batches = len(swarm.runner.batches)
        (again,) = await talk.step(0, [0], [text])
        assert torch.equal(first, again)
        assert len(swarm.runner.batches) == num_batches


async def test_a_repeat_that_arrives_during_the_step_waits_for_its_result() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(5)
        await talk.open()
        message = Step(talk.session_id, 0, 0, (0,), (5,))
        for _ in range(3):
            await talk.channel.send(message, (text,))
        answers = [await talk.channel.receive(20.0) for _ in range(3)]
        assert all(torch.equal(tensors[0], answers[0][1][0]) for _, tensors in answers)
        assert len(swarm.runner.batches) == 1


async def test_steps_sent_ahead_run_in_order() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(6)
        await talk.open()
        for i in range(6):
            message = Step(talk.session_id, 0, i, (i,), (1,))
            await talk.channel.send(message, (text[i : i + 1],))
        outputs = [(await talk.channel.receive(20.0))[1][0] for _ in range(6)]
        assert_close(torch.cat(outputs), swarm.expected(text))


async def test_two_parts_of_the_span_make_the_whole() -> None:
    async with served() as swarm:
        whole, hidden = states(9), states(9)
        for start, end in ((10, 11), (11, 14)):
            talk = await swarm.talk()
            talk.blocks = BlockSpan(start, end)
            await talk.open()
            (hidden,) = await talk.step(0, [0], [hidden])
        assert_close(hidden, swarm.expected(whole))
        assert len(swarm.service.sessions) == 2


async def test_frames_of_an_older_epoch_are_dropped() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(4)
        await talk.open(epoch=3)
        await talk.channel.send(Step(talk.session_id, 2, 0, (0,), (4,)), (states(4, seed=5),))
        answer, tensors = await talk.ask(Step(talk.session_id, 3, 1, (0,), (4,)), text)
        assert answer.step_id == 1
        assert_close(tensors[0], swarm.expected(text))


async def test_states_travel_in_the_dtype_of_the_session() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(4).bfloat16()
        await talk.open(dtype="bfloat16")
        (output,) = await talk.step(0, [0], [text])
        assert output.dtype == torch.bfloat16
        expected = swarm.expected(text.float())
        assert (output.float() - expected).abs().max() <= 1e-2 * expected.abs().max()


async def test_a_client_that_reconnects_goes_on_where_it_was() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(6)
        await talk.open()
        await talk.step(0, [0], [text[:5]])
        await talk.channel.close()
        again = await swarm.talk()
        (output,) = await again.step(1, [5], [text[5:]])
        assert_close(output, swarm.expected(text)[5:])
        await again.close()
        await swarm.at_rest()


async def test_opening_twice_is_opening_once() -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        await talk.channel.send(talk.opening())
        await talk.open()
        await talk.channel.receive(20.0)
        assert len(swarm.service.sessions) == 1
        await talk.close()
        await swarm.at_rest()


async def test_a_newer_epoch_opens_anew() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(3)
        await talk.open()
        await talk.step(0, [0], [text])
        await talk.open(epoch=1)
        answer, tensors = await talk.ask(Step(talk.session_id, 1, 0, (0,), (3,)), text)
        assert_close(tensors[0], swarm.expected(text))
        swarm.pool.check_integrity()
        assert len(swarm.service.sessions) == 1


async def test_a_channel_closes_only_what_it_opened() -> None:
    """A client gives up a reservation while another of its tasks has begun the session anew."""
    async with served() as swarm:
        old, new, text = await swarm.talk(), await swarm.talk(), states(6)
        await old.open()
        await new.open(epoch=1)
        await old.channel.send(Step(old.session_id, 0, 0, (0,), (6,)), (text,))
        answer, _ = await old.ask(CloseSession(old.session_id))
        assert isinstance(answer, SessionEnded)
        await old.channel.close()
        answer, tensors = await new.ask(Step(new.session_id, 1, 0, (0,), (6,)), text)
        assert isinstance(answer, StepResult)
        assert_close(tensors[0], swarm.expected(text))
        await new.close()
        await swarm.at_rest()


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


async def test_forward_keeps_nothing() -> None:
    async with served(scheduling=SchedulerConfig(max_batch_tokens=16)) as swarm:
        talk, texts = await swarm.talk(), [states(30, seed=1), states(7, seed=2)]
        message = Forward("tiny", (10, 14), (30, 7))
        answer, tensors = await talk.ask(message, torch.cat(texts))
        assert isinstance(answer, ForwardResult)
        for output, text in zip(tensors[0].split((30, 7)), texts):
            assert_close(output, swarm.expected(text))
        await swarm.at_rest()


async def test_info_says_how_it_is_now() -> None:
    async with served(num_tokens=512) as swarm:
        talk = await swarm.talk()
        await talk.open(max_length=256)
        info, _ = await talk.ask(GetInfo())
        assert isinstance(info, Info)
        assert (info.model, info.blocks, info.state) == ("tiny", (10, 14), "online")
        assert (info.num_sessions, info.tokens_free) == (1, 4 * 256)
        assert (info.max_length, info.hidden_size) == (256, 48)


async def test_two_clients_may_choose_the_same_id() -> None:
    async with served() as swarm:
        texts = [states(5, seed=1), states(5, seed=2)]
        talks = [await swarm.talk(), await swarm.talk(swarm.server)]
        for talk in talks:
            await talk.open()
        for talk, text in zip(talks, texts):
            (output,) = await talk.step(0, [0], [text])
            assert_close(output, swarm.expected(text))
