"""Forward and backward passes as a trainer asks for them, and what the local model gives."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from petals.models.runtime.span import Span
from petals.types import BlockSpan
from petals.wire.passes import Backward, BackwardResult, Forward, ForwardResult
from support.reference import assert_close, states
from support.service import Served
from support.talk import Talk

COUNTS = (9, 4, 13)
PASS_ID = b"p" * 16


@dataclass
class TrainingCase:
    """A pass, the gradients of its outputs, and what a server and the local model make of them."""

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
        """Outputs and gradients, each row for itself and block after block."""
        leaves = [tensor.float().requires_grad_() for tensor in self.inputs]
        hidden, prompts = (*leaves, None)[:2]
        outputs: list[list[torch.Tensor]] = []
        for row, state in enumerate(hidden.split(self.request.counts)):
            if not len(state):
                continue
            mine = None if prompts is None else prompts[:, row if prompts.shape[1] > 1 else 0]
            passed = list(block_outputs(span, state, mine, self.request.blocks))
            first = self.request.blocks[0]
            outputs.append([passed[-1], *(passed[tap - first] for tap in self.request.taps)])
        packed = [torch.cat(parts) for parts in zip(*outputs)]
        found = torch.autograd.grad(packed, leaves, [g.float() for g in self.gradients])
        return [output.detach() for output in packed], list(found)


def block_outputs(
    span: Span, state: torch.Tensor, prompts: torch.Tensor | None, blocks: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """One row [n, H] after each of the blocks; deep prompts: [len(blocks), P, H]."""
    for block in range(*blocks):
        if prompts is not None:
            prompt = prompts[block - blocks[0]][: len(state)]
            state = torch.cat([state[: len(prompt)] + prompt, state[len(prompt) :]])
        state = span.reference(state, BlockSpan(block, block + 1))
        yield state


@torch.no_grad()
def prompted(
    span: Span,
    text: torch.Tensor,
    prompts: torch.Tensor | None,
    blocks: tuple[int, int] = (10, 14),
) -> torch.Tensor:
    """One row [n, H] after all of the blocks, with deep prompts [len(blocks), P, H]."""
    return list(block_outputs(span, text, prompts, blocks))[-1]


def training_case(
    *,
    counts: tuple[int, ...] = COUNTS,
    blocks: tuple[int, int] = (10, 14),
    prompts: tuple[int, int] | None = None,
    taps: tuple[int, ...] = (),
    pass_id: bytes | None = PASS_ID,
    seed: int = 0,
) -> TrainingCase:
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
    return TrainingCase(request, inputs, gradients)


async def assert_right(swarm: Served, task: TrainingCase, kept: bool, error: float = 1e-5) -> None:
    talk = await swarm.talk()
    outputs, gradients = task.expected(swarm.reference)
    answer, found = await task.forward(talk)
    assert answer.kept == kept
    assert_close(found, outputs, error)
    result, back = await task.backward(talk, kept=kept)
    assert result.recomputed != kept
    assert_close(back, gradients, error)
    await swarm.at_rest()
