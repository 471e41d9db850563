"""Deep prompts of a session: added at the first positions of every row, in batches with others."""

import asyncio

import pytest
import torch

from petals.server.config import ClientLimits
from petals.server.policies import SchedulerConfig
from petals.types import BlockSpan
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import Served, served
from support.training_case import prompted, training_case

PROMPTS = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(3))


async def write(swarm: Served, prompts: torch.Tensor | None, number: int) -> None:
    """A prompt and some tokens in a session with ``prompts`` equal one pass with them."""
    talk, text = await swarm.talk(), states(16, seed=number)
    given = [] if prompts is None else [prompts]
    opening = talk.opening(num_prompt_tokens=0 if prompts is None else prompts.shape[1])
    await talk.ask(opening, *given)
    outputs = await talk.step(0, [0], [text[:3]])
    outputs += await talk.step(1, [3], [text[3:9]])
    for step in range(9, 16):
        outputs += await talk.step(step, [step], [text[step : step + 1]])
    expected = prompted(swarm.reference, text, prompts)
    assert_close([torch.cat(outputs)], [expected])
    # A rollback into the prompted positions adds them again, once.
    (again,) = await talk.step(20, [2], [text[2:]])
    assert_close([again], [expected[2:]])
    await talk.close()


@pytest.mark.parametrize("model", ["llama", "bloom", "gemma2", "deepseek_v3", "qwen3_next"])
async def test_a_session_reads_and_writes_behind_its_prompts(model: str) -> None:
    async with served(model) as swarm:
        await write(swarm, PROMPTS, 1)
        await swarm.at_rest()


async def test_sessions_with_and_without_prompts_and_passes_share_a_server() -> None:
    scheduling = SchedulerConfig(max_batch_tokens=16, min_chunk_tokens=1)
    async with served(scheduling=scheduling) as swarm:

        async def train() -> None:
            talk, task = await swarm.talk(), training_case(prompts=(1, 5))
            expected = task.expected(swarm.reference)[1]
            for _ in range(3):
                answer, _ = await task.forward(talk)
                _, found = await task.backward(talk, kept=answer.kept)
                assert_close(found, expected)

        prompts = [PROMPTS, None, -PROMPTS[:, :2], 2 * PROMPTS[:, :1]]
        await asyncio.gather(train(), *(write(swarm, p, n) for n, p in enumerate(prompts)))
        assert max(swarm.runner.batches) > 1
        await swarm.at_rest()


async def test_prompts_belong_to_the_blocks_of_the_session() -> None:
    async with served() as swarm:
        talk, text = await swarm.talk(), states(9)
        talk.blocks = BlockSpan(11, 13)
        await talk.ask(talk.opening(num_prompt_tokens=5), PROMPTS[:2])
        outputs = await talk.step(0, [0], [text])
        expected = prompted(swarm.reference, text, PROMPTS[:2], (11, 13))
        assert_close(outputs, [expected])


@pytest.mark.parametrize(
    ("num_tokens", "tensors", "code"),
    [
        (5, [], "bad_input"),
        (5, [PROMPTS, PROMPTS], "bad_input"),
        (0, [PROMPTS], "bad_input"),
        (4, [PROMPTS], "bad_input"),
        (5, [PROMPTS[:3]], "bad_input"),
        (5, [PROMPTS[:, None]], "bad_input"),
        (5, [PROMPTS.long()], "bad_input"),
        (5, [PROMPTS / 0], "bad_input"),
        (2**31 - 1, [PROMPTS], "length_exceeded"),
    ],
)
async def test_prompts_that_cannot_be(
    num_tokens: int, tensors: list[torch.Tensor], code: str
) -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        opening = talk.opening(num_prompt_tokens=num_tokens)
        assert (await talk.refused(opening, *tensors)).code == code
        await write(swarm, PROMPTS, 1)
        await swarm.at_rest()


async def test_prompts_count_while_their_session_lives() -> None:
    async with served(door=ClientLimits(max_bytes_per_peer=2 * PROMPTS.nbytes - 1)) as swarm:
        talk, other = await swarm.talk(), await swarm.talk()
        opening = talk.opening(num_prompt_tokens=5), other.opening(num_prompt_tokens=5)
        await talk.ask(opening[0], PROMPTS)
        assert (await other.refused(opening[1], PROMPTS)).code == "peer_busy"
        await talk.close()
        await write(swarm, PROMPTS, 1)
        await swarm.at_rest()
