"""Passes of a server and their way back: the gradients are the model's own, in any company."""

import pytest
import torch

from petals.server.policies import SchedulerConfig
from support.service import served
from support.training_case import COUNTS, assert_right, training_case

MODELS = (
    "llama",
    "bloom",
    "mixtral",
    "falcon",
    "gemma2",
    "gptj",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
)


@pytest.mark.parametrize("model", MODELS)
async def test_gradients_are_those_of_the_whole_model(model: str) -> None:
    async with served(model) as swarm:
        for prompts in (None, (1, 5), (3, 5)):
            await assert_right(swarm, training_case(prompts=prompts, taps=(11, 13, 10)), kept=True)


@pytest.mark.parametrize("model", ["llama", "bloom", "qwen3_next"])
async def test_without_room_they_are_the_same(model: str) -> None:
    async with served(model, training_bytes=0) as swarm:
        await assert_right(swarm, training_case(prompts=(1, 5), taps=(12,)), kept=False)


@pytest.mark.parametrize("model", ["llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("training_bytes", [0, 2**26])
async def test_cut_into_the_smallest_units_they_are_the_same(
    model: str, training_bytes: int
) -> None:
    scheduling = SchedulerConfig(max_batch_tokens=2, min_chunk_tokens=1)
    async with served(model, scheduling=scheduling, training_bytes=training_bytes) as swarm:
        task = training_case(prompts=(3, 5), taps=(12, 11))
        await assert_right(swarm, task, kept=training_bytes > 0)
        assert len(swarm.runner.batches) >= 3 * len(COUNTS)


async def test_a_part_of_the_span_has_gradients_too() -> None:
    async with served() as swarm:
        await assert_right(
            swarm, training_case(blocks=(11, 13), prompts=(1, 20), taps=(11,)), kept=True
        )


async def test_what_was_not_to_be_kept_is_not_kept() -> None:
    async with served() as swarm:
        await assert_right(swarm, training_case(pass_id=None), kept=False)


async def test_rows_without_tokens_take_part_in_silence() -> None:
    async with served() as swarm:
        await assert_right(swarm, training_case(counts=(0, 3, 0, 5, 0), prompts=(5, 2)), kept=True)
        talk, nothing = await swarm.talk(), training_case(counts=(0, 0), prompts=(2, 3))
        answer, outputs = await nothing.forward(talk)
        _, found = await nothing.backward(talk, kept=answer.kept)
        assert [len(tensor) for tensor in (*outputs, *found)] == [0, 0, 4]
        assert not found[1].any()
        await swarm.at_rest()


async def test_half_precision_travels_and_comes_back() -> None:
    async with served() as swarm:
        task = training_case(prompts=(1, 4), taps=(11,))
        task.inputs = [tensor.bfloat16() for tensor in task.inputs]
        task.gradients = [tensor.bfloat16() for tensor in task.gradients]
        await assert_right(swarm, task, kept=True, error=1e-2)
        _, found = await task.backward(await swarm.talk())
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}
