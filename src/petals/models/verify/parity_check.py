"""Checks one architecture: a tiny random model as a whole against the same model in three spans.

The checkpoint is saved and loaded as servers and clients load one; inputs and expected outputs are
taken at the first and the last block of the whole model, and at its head. Texts are longer than the
tiny windows, chunks and limits of ``tiny``, so that what changes there is seen. Where a model has
rotary factors, it is checked with dynamic and LongRoPE scaling as well. Knows no table and no other
process.
"""

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from petals.models.verify.client_side import client_logits
from petals.models.verify.self_test import (
    LENGTHS,
    STEPS,
    TestStep,
    relative_error,
    replay,
    run_self_test,
)
from petals.models.verify.tiny import tiny_config, with_rope_scaling
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
    "qwen2 (window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
}
"""Variants of an architecture that run other code: model type and changes of its config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """The result of one architecture.

    prefill, decode, mixed: largest relative error of ``PREFILL``, ``DECODE`` and ``STEPS``; NaN if
    not run. scaled: the largest of the three with rope factors that depend on the length; NaN if
    the model has none. client: error of the logits that a client's part of the model gives. mode:
    "" if the architecture is not supported. reason: why it is not supported, or why it does not run
    packed. seconds: time of the check.
    """

    name: str
    mode: str = ""
    prefill: float = float("nan")
    decode: float = float("nan")
    mixed: float = float("nan")
    scaled: float = float("nan")
    client: float = float("nan")
    reason: str = ""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """All errors are below 1e-5."""
        errors = (self.prefill, self.decode, self.mixed, self.client)
        return all(error < EXACT for error in errors) and not self.scaled >= EXACT


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


def _config(name: str) -> PretrainedConfig:
    model_type, overrides = VARIANTS.get(name, (name, {}))
    return tiny_config(model_type, **overrides)


def _tiny(name: str) -> tuple[ModelArch, PreTrainedModel]:
    try:
        config = _config(name)
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
    with _spans(whole, arch) as (folder, spans):
        errors = _errors(spans, *_border_states(base_within(whole, arch), arch))
        _refuse_wrong(max(errors), "its blocks, run apart, differ")
        client = _client_error(Path(folder), spans, whole, arch)
        _refuse_wrong(client, "a client's part of it around these blocks differs")
    scaled = _scaled_error(name)
    _refuse_wrong(scaled, "with dynamic or LongRoPE scaling it differs")
    reasons = [span.reason for span in spans if span.reason]
    return ParityRow(
        name=name,
        mode=max((span.mode for span in spans), key=list(Mode).index),
        prefill=errors[0],
        decode=errors[1],
        mixed=errors[2],
        scaled=scaled,
        client=client,
        reason=reasons[0] if reasons else "",
    )


@contextmanager
def _spans(whole: PreTrainedModel, arch: ModelArch) -> Iterator[tuple[str, list[Span]]]:
    """The model as a checkpoint's folder, and its blocks in three spans that passed their test."""
    cuts = [0, 1, arch.num_blocks // 2 + 1, arch.num_blocks]
    with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX) as folder:
        whole.save_pretrained(Path(folder))
        check_weights(open_checkpoint(folder))
        spans = [
            Span(load_blocks(folder, BlockSpan(start, end))) for start, end in zip(cuts, cuts[1:])
        ]
        for span in spans:
            run_self_test(span)
        yield folder, spans


def _errors(
    spans: Sequence[Span], texts: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> list[float]:
    """The largest relative errors of ``PREFILL``, ``DECODE`` and ``STEPS``."""
    stages = [(span, span.blocks) for span in spans]
    return [replay(stages, steps, texts, expected) for steps in (PREFILL, DECODE, STEPS)]


def _client_error(
    folder: Path, spans: Sequence[Span], whole: PreTrainedModel, arch: ModelArch
) -> float:
    ids = _token_ids(arch, LENGTHS[0], seed=0)
    # As transformers loads the checkpoint: some models change a tensor after loading.
    stock = type(whole).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = stock(input_ids=ids, use_cache=False).logits[0]
    try:
        found = client_logits(folder, spans, ids)
    except MODEL_CODE_ERRORS as error:
        raise ModelNotSupported(f"a client cannot load it ({_in_short(error)})") from error
    return relative_error(found, expected, exact=True)


def _scaled_error(name: str) -> float:
    """The largest error with rope factors that depend on the length; NaN if the model has none."""
    worst = float("nan")
    for kind in ("dynamic", "longrope"):
        try:
            scaled = with_rope_scaling(_config(name), kind)
            if scaled is None:
                continue
            arch = describe(scaled)
            whole = random_model(scaled, arch)
            texts, expected = _border_states(base_within(whole, arch), arch)
        except MODEL_CODE_ERRORS:
            continue  # transformers itself cannot run it
        with _spans(whole, arch) as (folder, spans):
            _client_error(Path(folder), spans, whole, arch)
            error = max(_errors(spans, texts, expected))
        worst = error if worst != worst else max(worst, error)
    return worst


def _refuse_wrong(error: float, what: str) -> None:
    """Raises ModelNotSupported for an error that is no rounding; NaN: nothing was compared."""
    if error >= WRONG:
        raise ModelNotSupported(f"{what} by {error:.0e} from the whole")


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
    seen = {}
    # Rotary modules remember the longest text: the shortest comes first.
    for seed, length in sorted(enumerate(LENGTHS), key=lambda item: item[1]):
        base(input_ids=_token_ids(arch, length, seed), use_cache=False)
        seen[seed] = borders.entered[0].clone(), borders.left[0].clone()
    return [seen[seed][0] for seed in range(len(seen))], [
        seen[seed][1] for seed in range(len(seen))
    ]


def _token_ids(arch: ModelArch, length: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, arch.vocab_size, (1, length), generator=random)
