"""What clients do in each phase, and the results that the local model gives for it.

Knows models and tokens; knows no faults and no processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chaos.schedule import Phase

NUM_CLIENTS = 8
PREFILL_CHUNK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """One call of ``generate``: ids [rows, columns], mask of the same shape, options."""

    ids: Tensor
    mask: Tensor
    options: Mapping[str, Any]

    @property
    def is_streamable(self) -> bool:
        return self.ids.shape[0] == 1 and self.options.get("num_beams", 1) == 1

    def run(self, model: PreTrainedModel, **more: Any) -> Tensor:
        """Token ids [rows, columns + new]."""
        return model.generate(self.ids, attention_mask=self.mask, **self.options, **more)


@dataclass(frozen=True, slots=True)
class GradientRun:
    """Forward and backward passes of several batches: ids [batches, rows, columns]."""

    ids: Tensor

    def run(self, model: PreTrainedModel, on_step: Callable[[], None] = lambda: None) -> Tensor:
        """The gradients of the embedded inputs, [batches, rows, columns, H]."""
        found = []
        for ids in self.ids:
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
            on_step()
            loss.backward()
            on_step()
            assert embeds.grad is not None
            found.append(embeds.grad)
        return torch.stack(found)


@dataclass(frozen=True, slots=True)
class Workload:
    """What all clients of a phase do at the same time, and the right results."""

    phase: Phase
    calls: tuple[Generation | GradientRun, ...]
    expected: tuple[Tensor, ...]


def make_workload(local: PreTrainedModel, phase: Phase, scale: int = 2) -> Workload:
    """The same for every run: ``scale`` multiplies the number of tokens."""
    calls = _calls(phase, local.config.get_text_config().vocab_size, scale)
    return Workload(phase, calls, tuple(call.run(local) for call in calls))


def greedy(ids: Tensor, num_tokens: int, vocab_size: int, **options: Any) -> Generation:
    """A generation that no end token ends: every run of it has the same length."""
    fixed = {"do_sample": False, "eos_token_id": vocab_size, "pad_token_id": 0}
    return Generation(ids, torch.ones_like(ids), {"max_new_tokens": num_tokens, **fixed, **options})


def _calls(phase: Phase, vocab_size: int, scale: int) -> tuple[Generation | GradientRun, ...]:
    random = torch.Generator().manual_seed(len(phase))
    first, end = min(5, vocab_size // 2), min(20_000, vocab_size)

    def ids(rows: int, columns: int) -> Tensor:
        return torch.randint(first, end, (rows, columns), generator=random)

    def call(prompt: Tensor, num_tokens: int, **options: Any) -> Generation:
        return greedy(prompt, num_tokens * scale, vocab_size, **options)

    match phase:
        case Phase.PREFILL:
            return (call(ids(1, 8 * PREFILL_CHUNK_TOKENS * scale), 4),)
        case Phase.DECODE:
            return (call(ids(1, 12), 20),)
        case Phase.ROLLBACK:
            return (call(ids(1, 6).repeat(1, 4), 20, prompt_lookup_num_tokens=4),)
        case Phase.BEAMS:
            return (call(ids(1, 10), 14, num_beams=3),)
        case Phase.BATCH:
            batch = call(ids(4, 12), 12)
            for row, padding in enumerate((0, 5, 2, 9)):
                batch.mask[row, :padding] = 0
                batch.ids[row, :padding] = 0
            return (batch,)
        case Phase.TRAINING:
            return (GradientRun(ids(8 * scale * 4, 12).view(8 * scale, 4, 12)),)
        case Phase.CROWD:
            return tuple(call(ids(1, 6 + number), 8) for number in range(NUM_CLIENTS))
