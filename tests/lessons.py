"""Passes of a tiny model as a trainer makes them, and what local blocks make of the same."""

from dataclasses import dataclass

import torch

from petals.models.batch import BatchContext, Segment
from petals.models.span import Mode, Span
from petals.types import BlockSpan
from petals.wire.passes import Backward, BackwardResult, Forward, ForwardResult
from served_span import Served, Talk, states

COUNTS = (9, 4, 13)
PASS_ID = b"p" * 16


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
