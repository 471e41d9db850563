"""Passes of a server and their way back: the gradients are the model's own, in any company."""

import asyncio
from dataclasses import dataclass

import pytest
import torch

from petals.models.batch import BatchContext, Segment
from petals.models.span import Mode, Span
from petals.server.scheduler import SchedulerConfig
from petals.types import BlockSpan
from petals.wire.passes import Backward, BackwardResult, Forward, ForwardResult
from served_span import Served, Talk, served, states

COUNTS = (9, 4, 13)
PASS_ID = b"p" * 16
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


@dataclass
class Lesson:
    """A pass, the gradients that its user has for its outputs, and what comes of it."""

    request: Forward
    inputs: list[torch.Tensor]
    gradients: list[torch.Tensor]

    async def forward(self, talk: Talk) -> tuple[ForwardResult, list[torch.Tensor]]:
        answer, outputs = await talk.ask(self.request, *self.inputs)
        assert isinstance(answer, ForwardResult), answer
        return answer, outputs

    async def backward(
        self, talk: Talk, kept: bool = False
    ) -> tuple[BackwardResult, list[torch.Tensor]]:
        inputs = [] if kept else self.inputs
        answer, found = await talk.ask(Backward(self.request, kept=kept), *self.gradients, *inputs)
        assert isinstance(answer, BackwardResult), answer
        return answer, found

    def expected(self, span: Span) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs and gradients by each row's own way through the model, block after block."""
        leaves = [tensor.float().requires_grad_() for tensor in self.inputs]
        hidden, prompts = (*leaves, None)[:2]
        outputs: list[list[torch.Tensor]] = []
        for row, state in enumerate(hidden.split(self.request.counts)):
            if not len(state):
                continue
            outputs.append([])
            for block in range(*self.request.blocks):
                if prompts is not None:
                    of_block = prompts[block - self.request.blocks[0]]
                    prompt = of_block[row if len(of_block) > 1 else 0][: len(state)]
                    front = state[: len(prompt)] + prompt
                    state = torch.cat([front, state[len(prompt) :]])
                state = through_one(span, block, state)
                if block in self.request.taps:
                    outputs[-1].append(state)
            outputs[-1].insert(0, state)
        order = [0, *(1 + sorted(self.request.taps).index(tap) for tap in self.request.taps)]
        packed = [torch.cat([row[index] for row in outputs]) for index in order]
        found = torch.autograd.grad(packed, leaves, [g.float() for g in self.gradients])
        return [output.detach() for output in packed], list(found)


def through_one(span: Span, block: int, hidden: torch.Tensor) -> torch.Tensor:
    """One block, by the model's own attention and without a cache."""
    span._use_attention(packed=False)
    try:
        segment = Segment(hidden=hidden, blocks=BlockSpan(block, block + 1))
        context = BatchContext([segment], span.blocks, packed=False)
        span._call_base(context, None)
        return context.outputs[0]
    finally:
        span._use_attention(packed=span.mode is Mode.PACKED)


def lesson(
    *,
    counts: tuple[int, ...] = COUNTS,
    blocks: tuple[int, int] = (10, 14),
    prompts: tuple[int, int] | None = None,
    taps: tuple[int, ...] = (),
    pass_id: bytes | None = PASS_ID,
    seed: int = 0,
) -> Lesson:
    """``prompts``: (rows or 1, tokens)."""
    random = torch.Generator().manual_seed(seed)
    total = sum(counts)
    inputs = [states(total, seed=seed)]
    if prompts is not None:
        shape = (blocks[1] - blocks[0], *prompts, inputs[0].shape[1])
        inputs.append(torch.randn(shape, generator=random))
    request = Forward(
        "tiny",
        blocks,
        counts,
        num_prompt_tokens=0 if prompts is None else prompts[1],
        taps=taps,
        pass_id=pass_id,
    )
    gradients = [states(total, seed=seed + 50 + index) for index in range(1 + len(taps))]
    return Lesson(request, inputs, gradients)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], error: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert (one.float() - other).norm() <= error * other.norm()


async def assert_right(swarm: Served, task: Lesson, kept: bool, error: float = 1e-5) -> None:
    talk = await swarm.talk()
    outputs, gradients = task.expected(swarm.reference)
    answer, found = await task.forward(talk)
    assert answer.kept == kept
    assert_equal(found, outputs, error)
    result, back = await task.backward(talk, kept=kept)
    assert result.recomputed != kept
    assert_equal(back, gradients, error)
    await swarm.at_rest()


@pytest.mark.parametrize("model", MODELS)
async def test_gradients_are_those_of_the_whole_model(model: str) -> None:
    async with served(model) as swarm:
        for prompts in (None, (1, 5), (3, 5)):
            await assert_right(swarm, lesson(prompts=prompts, taps=(11, 13, 10)), kept=True)


@pytest.mark.parametrize("model", ["llama", "bloom", "qwen3_next"])
async def test_without_room_they_are_the_same(model: str) -> None:
    async with served(model, training_bytes=0) as swarm:
        await assert_right(swarm, lesson(prompts=(1, 5), taps=(12,)), kept=False)


@pytest.mark.parametrize("model", ["llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("training_bytes", [0, 2**26])
async def test_cut_into_the_smallest_units_they_are_the_same(
    model: str, training_bytes: int
) -> None:
    scheduling = SchedulerConfig(max_batch_tokens=2, min_chunk_tokens=1)
    async with served(model, scheduling=scheduling, training_bytes=training_bytes) as swarm:
        task = lesson(prompts=(3, 5), taps=(12, 11))
        await assert_right(swarm, task, kept=training_bytes > 0)
        assert len(swarm.runner.batches) >= 3 * len(COUNTS)


async def test_a_part_of_the_span_has_gradients_too() -> None:
    async with served() as swarm:
        await assert_right(swarm, lesson(blocks=(11, 13), prompts=(1, 20), taps=(11,)), kept=True)


async def test_what_was_not_to_be_kept_is_not_kept() -> None:
    async with served() as swarm:
        await assert_right(swarm, lesson(pass_id=None), kept=False)


async def test_rows_without_tokens_take_part_in_silence() -> None:
    async with served() as swarm:
        await assert_right(swarm, lesson(counts=(0, 3, 0, 5, 0), prompts=(5, 2)), kept=True)
        talk, nothing = await swarm.talk(), lesson(counts=(0, 0), prompts=(2, 3))
        answer, outputs = await nothing.forward(talk)
        _, found = await nothing.backward(talk, kept=answer.kept)
        assert [len(tensor) for tensor in (*outputs, *found)] == [0, 0, 4]
        assert not found[1].any()
        await swarm.at_rest()


async def test_half_precision_travels_and_comes_back() -> None:
    async with served() as swarm:
        task = lesson(prompts=(1, 4), taps=(11,))
        task.inputs = [tensor.bfloat16() for tensor in task.inputs]
        task.gradients = [tensor.bfloat16() for tensor in task.gradients]
        await assert_right(swarm, task, kept=True, error=1e-2)
        _, found = await task.backward(await swarm.talk())
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}


async def test_sessions_go_on_between_the_units_of_passes() -> None:
    scheduling = SchedulerConfig(max_batch_tokens=16, min_chunk_tokens=1)
    async with served(scheduling=scheduling) as swarm:
        expected, texts = lesson(prompts=(1, 5)).expected(swarm.reference)[1], states(30)
        whole = swarm.expected(texts)

        async def train(number: int) -> None:
            talk, task = await swarm.talk(), lesson(prompts=(1, 5), pass_id=bytes([number]) * 16)
            for _ in range(3):
                answer, _ = await task.forward(talk)
                _, found = await task.backward(talk, kept=answer.kept)
                assert_equal(found, expected, 1e-5)

        async def write(number: int) -> None:
            talk = await swarm.talk()
            talk.session_id = bytes([number]) * 16
            await talk.open()
            outputs = []
            for step in range(len(texts)):
                outputs += await talk.step(step, [step], [texts[step : step + 1]])
            assert_equal([torch.cat(outputs)], [whole], 1e-5)
            await talk.close()

        await asyncio.gather(*(train(n) for n in range(3)), *(write(n) for n in range(3)))
        await swarm.at_rest()
