"""Checks one architecture: a tiny random model as a whole against the same model in three spans.

The checkpoint is saved and loaded as a server loads one; inputs and expected outputs are taken at
the first and the last block of the whole model. Knows no table and no other process.
"""

import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.errors import ModelFilesBroken, ModelNotSupported
from petals.models.checkpoint.arch import ModelArch, describe
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.head import HeadKind, base_within, class_for
from petals.models.loading.loadable import check_weights
from petals.models.loading.split import load_blocks
from petals.models.runtime.span import MODEL_CODE_ERRORS, Mode, Span
from petals.models.verify.self_test import LENGTHS, STEPS, TestStep, replay, run_self_test
from petals.models.verify.tiny import tiny_config
from petals.types import BlockSpan

EXACT = 1e-5
"""Relative error (f32) below which an architecture counts as exact."""

WRONG = 1e-3
"""Relative error (f32) from which on an architecture is refused."""

_FOLDER_PREFIX = "petals-parity-"

PREFILL: tuple[TestStep, ...] = (((0, 0, 20),),)
DECODE: tuple[TestStep, ...] = (
    ((0, 0, 9),),
    ((0, 9, 12),),
    ((0, 12, 13),),
    ((0, 13, 14),),
    ((0, 11, 15),),
    ((0, 15, 16),),
    ((0, 5, 20),),
)
"""A prompt, a second part, single tokens, with rollbacks of three and of eleven tokens."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (alibi)": (
        "falcon",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    ),
    "falcon (grouped)": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama (dynamic rope)": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "max_position_embeddings": 128,
        },
    ),
    "phi3 (longrope)": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            "max_position_embeddings": 128,
        },
    ),
    "qwen2 (window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
}
"""Variants of an architecture that run other code: model type and changes of its config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """The result of one architecture.

    prefill, decode, mixed: largest relative error of ``PREFILL``, ``DECODE`` and ``STEPS``; NaN if
    not run. mode: "" if the architecture is not supported. reason: why it is not supported, or why
    it does not run packed. seconds: time of the check.
    """

    name: str
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


def check_architecture(name: str) -> ParityRow:
    """Build, save, split, run and compare one architecture. Failures are in the row's reason."""
    started = time.monotonic()
    try:
        row = _compare(name)
    except ModelNotSupported as error:
        row = ParityRow(name=name, reason=error.message)
    except MODEL_CODE_ERRORS as error:
        row = ParityRow(name=name, reason=f"a part of it cannot be loaded ({_in_short(error)})")
    return replace(row, seconds=time.monotonic() - started)


def _tiny(name: str) -> tuple[ModelArch, PreTrainedModel]:
    model_type, overrides = VARIANTS.get(name, (name, {}))
    try:
        config = tiny_config(model_type, **overrides)
        arch = describe(config)
        return arch, random_model(config, arch)
    except ModelNotSupported:
        raise
    except ModelFilesBroken as error:
        reason = _in_short(error.__cause__ or error)
        raise ModelNotSupported(f"no tiny model of it can be built ({reason})") from error
    except (*MODEL_CODE_ERRORS, StrictDataclassError) as error:
        raise ModelNotSupported(f"no tiny model of it can be built ({_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # The last line of a config's error names the value, the first one only the rule.
    text = re.sub(rf"\S*{_FOLDER_PREFIX}[^\s>]*>?", "its checkpoint", lines[-1])
    return f"{type(error).__name__}: {text[:160]}"


def random_model(config: PretrainedConfig, arch: ModelArch, seed: int = 0) -> PreTrainedModel:
    """The whole model in f32, with noise added to every tensor.

    Initial values of 0 and 1 (biases, norms) would hide a tensor that was not loaded.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = class_for(HeadKind.CAUSAL_LM, config, arch)._from_config(
            config, dtype=torch.float32
        )
        stored = model.state_dict(keep_vars=True).values()
        for tensor in {tensor.data_ptr(): tensor for tensor in stored}.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def _compare(name: str) -> ParityRow:
    arch, whole = _tiny(name)
    with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX) as folder:
        whole.save_pretrained(Path(folder))
        check_weights(open_checkpoint(folder))
        cuts = [0, 1, arch.num_blocks // 2 + 1, arch.num_blocks]
        spans = [
            Span(load_blocks(folder, BlockSpan(start, end))) for start, end in zip(cuts, cuts[1:])
        ]
    for span in spans:
        run_self_test(span)
    base = base_within(whole, arch)
    texts, expected = _border_states(base, arch)
    stages = [(span, span.blocks) for span in spans]
    errors = [replay(stages, steps, texts, expected) for steps in (PREFILL, DECODE, STEPS)]
    reasons = [span.reason for span in spans if span.reason]
    if not max(errors) < WRONG:
        raise ModelNotSupported(
            f"its blocks, run apart, differ by {max(errors):.0e} from the whole"
        )
    return ParityRow(
        name=name,
        mode=max((span.mode for span in spans), key=list(Mode).index),
        prefill=errors[0],
        decode=errors[1],
        mixed=errors[2],
        reason=reasons[0] if reasons else "",
    )


class _BorderHooks:
    """Keeps the states [1, n, H] that entered the first and left the last block."""

    def __init__(self, base: nn.Module, arch: ModelArch) -> None:
        layers = base.get_submodule(arch.layers_path)
        self.entered = self.left = torch.empty(0)
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.entered = args[0] if args else kwargs["hidden_states"]

    def _leave(self, layer: nn.Module, args: tuple, output: object) -> None:
        self.left = output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def _border_states(
    base: nn.Module, arch: ModelArch
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each text, the states [n, H] that enter the first and leave the last block."""
    borders = _BorderHooks(base, arch)
    texts, expected = [], []
    for seed, length in enumerate(LENGTHS):
        base(input_ids=_token_ids(arch, length, seed), use_cache=False)
        texts.append(borders.entered[0].clone())
        expected.append(borders.left[0].clone())
    return texts, expected


def _token_ids(arch: ModelArch, length: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, arch.vocab_size, (1, length), generator=random)
