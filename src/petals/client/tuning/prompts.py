"""Trained prompts: vectors before a model's first token, and others added inside its blocks.

Mode "ptune" puts ``pre_seq_len`` trained vectors before the embeddings of every sequence;
"deep_ptune" also adds trained vectors to the same positions at the input of each block. Makes the
parameters, and the arguments of a forward that includes them. Knows no sessions, routes or files.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from petals.errors import ConfigError

PROMPTS = "prompt_embeddings"
DEEP_PROMPTS = "intermediate_prompt_embeddings"
_MODES = ("ptune", "deep_ptune")
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """Which prompts are trained: ``tuning_mode`` None, "ptune" or "deep_ptune", and how many.

    Raises ConfigError for another mode, and for a mode without tokens.
    """

    tuning_mode: str | None = None
    pre_seq_len: int = 0

    def __post_init__(self) -> None:
        if self.tuning_mode is None:
            return
        if self.tuning_mode not in _MODES:
            raise ConfigError(
                f"There is no tuning_mode {self.tuning_mode!r}.",
                hint='It is "ptune" or "deep_ptune"; leave it out to train no prompts.',
            )
        if not isinstance(self.pre_seq_len, int) or self.pre_seq_len < 1:
            raise ConfigError(
                f"tuning_mode={self.tuning_mode!r} with pre_seq_len={self.pre_seq_len!r} "
                "would train no token.",
                hint="Give the number of vectors before each sequence: pre_seq_len=16.",
            )


def add_prompts(host: PreTrainedModel, tuning: TuningConfig, num_blocks: int) -> None:
    """Give ``host``, the innermost model around the blocks, its trainable prompts, in f32.

    ``prompt_embeddings.weight`` [P, E] begins as embeddings of random tokens;
    ``intermediate_prompt_embeddings.weight`` [P, num_blocks * H] begins as zeros, which have no
    effect. Draws from torch's global random generator.
    """
    if tuning.tuning_mode is None:
        return
    num_tokens, embeddings = tuning.pre_seq_len, host.get_input_embeddings()
    tokens = torch.randint(embeddings.num_embeddings, (num_tokens,))
    with torch.no_grad():
        first = embeddings(tokens.to(embeddings.weight.device)).float().clone()
    setattr(host, PROMPTS, nn.Embedding.from_pretrained(first, freeze=False))
    if tuning.tuning_mode == "deep_ptune":
        width = num_blocks * host.config.get_text_config(decoder=True).hidden_size
        deep = torch.zeros(num_tokens, width, device=first.device)
        setattr(host, DEEP_PROMPTS, nn.Embedding.from_pretrained(deep, freeze=False))


def num_prompt_tokens(host: nn.Module) -> int:
    """Number of trained prompts P; 0 for a model without any."""
    prompts = host._modules.get(PROMPTS)
    return 0 if prompts is None else prompts.num_embeddings


def deep_prompts(host: PreTrainedModel, num_blocks: int) -> Tensor | None:
    """[num_blocks, P, H] in the dtype of the embeddings; None for a model without deep prompts."""
    deep = host._modules.get(DEEP_PROMPTS)
    if deep is None:
        return None
    by_token: Tensor = deep.weight.view(deep.num_embeddings, num_blocks, -1)
    return by_token.transpose(0, 1).to(host.get_input_embeddings().weight.dtype)


def with_prompts(host: PreTrainedModel, call: dict[str, Any], num_past: int) -> dict[str, Any]:
    """The arguments of a tuned model's forward, with its prompts.

    ``num_past`` columns have run before in the same session, prompts included; prompts that have
    not run yet precede the tokens. Positions count prompts and continue without a gap at each row's
    first token, also where padding lies between the two.
    """
    num_tokens = num_prompt_tokens(host)
    num_new = max(0, num_tokens - num_past)
    call = dict(call)
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    num_rows = (ids if ids is not None else call["inputs_embeds"]).shape[0]
    if num_new:
        if embeds is None:
            embeds = host.get_input_embeddings()(ids)
            call["input_ids"] = None
        prompts = host._modules[PROMPTS].weight[num_past:].to(embeds)
        call["inputs_embeds"] = torch.cat([prompts.expand(num_rows, -1, -1), embeds], dim=1)
        for name in _TOKEN_TYPES:
            if call.get(name) is not None:
                types = call[name]
                call[name] = torch.cat([types.new_zeros(num_rows, num_new), types], dim=1)
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and mask.ndim == 2:
        mask = torch.cat([mask.new_ones(len(mask), num_tokens), mask], dim=1)
        call["attention_mask"] = mask
    if positions is not None:
        ahead = torch.arange(num_tokens - num_new, num_tokens, device=positions.device)
        ahead = ahead.expand(*positions.shape[:-1], num_new)
        call["position_ids"] = torch.cat([ahead, positions + num_tokens], dim=-1)
    elif mask is not None and mask.ndim == 2 and not bool(mask.all()) and _takes_positions(host):
        call["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, num_past:]
    return call


def _takes_positions(host: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(host.forward).parameters


def without_prompts(
    output: ModelOutput | tuple[Tensor, ...], num_new: int, num_columns: int
) -> ModelOutput | tuple[Tensor, ...]:
    """A model's output without the first ``num_new`` of its ``num_columns`` columns."""

    def cut(value: object) -> object:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == num_columns:
            return value[:, num_new:]
        return tuple(cut(entry) for entry in value) if type(value) is tuple else value

    if isinstance(output, ModelOutput):
        for name, value in list(output.items()):
            output[name] = cut(value)
        return output
    return cut(output)
