"""One architecture against itself: a tiny random model, whole and in three spans.

The checkpoint is saved and loaded the way a server loads one; inputs and expected outputs are
taken at the first and last block of the whole model. Knows no table and no other process.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from petals.errors import ModelNotSupported
from petals.models.arch import ModelArch, describe
from petals.models.head import EndsKind, base_within, class_for
from petals.models.self_test import LENGTHS, STEPS, Step, relative_error, replay
from petals.models.span import FOREIGN_ERRORS, Mode, Span
from petals.models.split import load_blocks
from petals.models.tiny import tiny_config
from petals.types import BlockSpan

EXACT = 1e-5

PREFILL: tuple[Step, ...] = (((0, 0, 20),),)
DECODE: tuple[Step, ...] = (
    ((0, 0, 9),),
    ((0, 9, 12),),
    ((0, 12, 13),),
    ((0, 13, 14),),
    ((0, 11, 15),),
    ((0, 15, 16),),
    ((0, 5, 20),),
)
"""A prompt, a further part, tokens one by one, with rollbacks of three and of eleven tokens."""

_CHUNKS = ((0, 9), (9, 12), (12, 13), (13, 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """What became of one architecture. Errors are relative to the whole model, nan if not run.

    ``mode`` is empty and ``reason`` says why if the architecture is not supported; ``reason`` also
    says why it runs one by one.
    """

    model_type: str
    mode: str = ""
    prefill: float = float("nan")
    decode: float = float("nan")
    mixed: float = float("nan")
    reason: str = ""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """All three errors are below 1e-5."""
        return all(error < EXACT for error in (self.prefill, self.decode, self.mixed))


def check_architecture(model_type: str) -> ParityRow:
    """Build, save, split, run and compare one architecture. Never raises for what it finds."""
    started = time.monotonic()
    try:
        row = _compare(model_type)
    except ModelNotSupported as error:
        row = ParityRow(model_type=model_type, reason=error.message)
    except FOREIGN_ERRORS as error:
        text = str(error).strip().splitlines() or [""]
        row = ParityRow(model_type=model_type, reason=f"{type(error).__name__}: {text[0]}"[:200])
    return ParityRow(
        model_type=model_type,
        mode=row.mode,
        prefill=row.prefill,
        decode=row.decode,
        mixed=row.mixed,
        reason=row.reason,
        seconds=time.monotonic() - started,
    )


def random_model(config: PretrainedConfig, arch: ModelArch, seed: int = 0) -> PreTrainedModel:
    """The whole model in f32; every tensor is moved off its initial value, so that a lost one shows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = class_for(EndsKind.CAUSAL_LM, config, arch)._from_config(
            config, dtype=torch.float32
        )
        stored = model.state_dict(keep_vars=True).values()
        for tensor in {tensor.data_ptr(): tensor for tensor in stored}.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def _compare(model_type: str) -> ParityRow:
    config = tiny_config(model_type)
    arch = describe(config)
    whole = random_model(config, arch)
    with tempfile.TemporaryDirectory(prefix="petals-parity-") as folder:
        whole.save_pretrained(Path(folder))
        cuts = [0, 1, arch.num_blocks // 2 + 1, arch.num_blocks]
        spans = [
            Span(load_blocks(folder, BlockSpan(start, end))) for start, end in zip(cuts, cuts[1:])
        ]
    base = base_within(whole, arch)
    texts, expected = _undisturbed(base, arch)
    stages = [(span, span.blocks) for span in spans]
    errors = [replay(stages, steps, texts, expected) for steps in (PREFILL, DECODE, STEPS)]
    reasons = [span.reason for span in spans if span.reason]
    if max(errors[1:]) > EXACT > errors[0]:
        changed = _change_by_feeding_in_parts(base, arch)
        if changed > EXACT:
            raise ModelNotSupported(
                f"the model itself gives other results ({changed:.0e}) for a text fed in parts"
            )
    return ParityRow(
        model_type=model_type,
        mode=Mode.ONE_BY_ONE if reasons else Mode.PACKED,
        prefill=errors[0],
        decode=errors[1],
        mixed=errors[2],
        reason=reasons[0] if reasons else "",
    )


class _Borders:
    """Hidden states [1, n, H] that entered the first and left the last block."""

    def __init__(self, base: nn.Module, arch: ModelArch) -> None:
        layers = base.get_submodule(arch.layers_path)
        self.entered = self.left = torch.empty(0)
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.entered = args[0] if args else kwargs["hidden_states"]

    def _leave(self, layer: nn.Module, args: tuple, output: object) -> None:
        self.left = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]


@torch.inference_mode()
def _undisturbed(base: nn.Module, arch: ModelArch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    borders = _Borders(base, arch)
    texts, expected = [], []
    for seed, length in enumerate(LENGTHS):
        base(input_ids=_token_ids(arch, length, seed), use_cache=False)
        texts.append(borders.entered[0].clone())
        expected.append(borders.left[0].clone())
    return texts, expected


@torch.inference_mode()
def _change_by_feeding_in_parts(base: nn.Module, arch: ModelArch) -> float:
    """How far the whole model, with its own cache, is from itself without one."""
    borders = _Borders(base, arch)
    token_ids = _token_ids(arch, LENGTHS[0], 0)
    base(input_ids=token_ids, use_cache=False)
    at_once = borders.left[0].clone()
    cache = DynamicCache(config=base.config)
    parts = []
    for first, last in _CHUNKS:
        base(input_ids=token_ids[:, first:last], past_key_values=cache, use_cache=True)
        parts.append(borders.left[0].clone())
    return relative_error(torch.cat(parts), at_once)


def _token_ids(arch: ModelArch, length: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, arch.vocab_size, (1, length), generator=random)
