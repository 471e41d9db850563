"""The self-test: compares a span with the model's own path before a server serves it.

Three sessions of different lengths run prefill, decode and rollback, mixed in shared steps; the
expected outputs come from one pass of each text through the model's own forward. A span that fails
falls back to a slower mode; one that fails in every mode is refused. Blocks that differ from tested
blocks only in their weights get a shorter test. Knows no server.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from petals.errors import ModelNotSupported
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import SlabRow
from petals.models.runtime.span import MODEL_CODE_ERRORS, Mode, Span
from petals.models.verify.block_signature import signature_of
from petals.types import BlockSpan

logger = logging.getLogger(__name__)

TestStep = tuple[tuple[int, int, int], ...]
"""(session, first token, end of tokens) for each session that takes part."""

SpanPart = tuple[Span, BlockSpan]
"""A span, and the blocks of it that sessions pass through."""

LENGTHS = (20, 13, 17)
"""Tokens in the text of each session."""

STEPS: tuple[TestStep, ...] = (
    ((0, 0, 9),),
    ((0, 9, 10), (1, 0, 5)),
    ((0, 10, 11), (1, 5, 6), (2, 0, 12)),
    ((1, 4, 9), (2, 12, 13), (0, 11, 15)),
    ((0, 13, 14), (1, 9, 10), (2, 13, 14)),
    ((2, 14, 15), (0, 14, 15), (1, 10, 11)),
    ((0, 15, 16), (1, 11, 12), (2, 15, 16)),
    ((0, 6, 20), (1, 12, 13), (2, 3, 17)),
)
"""Prefill at once and in parts, decode alone and batched, rollback by one token and by many."""

BRIEF_STEPS: tuple[TestStep, ...] = (
    tuple((session, 0, length) for session, length in enumerate(LENGTHS)),
)
"""Prefill only, for blocks with the signature of blocks that have passed ``STEPS``: it still shows
weights that are NaN or infinite.
"""

_STRIP_BLOCKS = 4
"""Blocks that are compared at once. Differences in the last bits grow with every block, with random
states even faster than with a text: over a whole span a correct result could exceed the tolerance.
"""

_TOLERANCE = 1e-4
"""Largest relative error in f32 without quantization. Only the order of sums differs then, which
changes the last bits; a mistake in masks, positions or rows changes far more.
"""

_ROUNDED_TOLERANCE = 1e-1
"""Largest relative error in half precision or with quantized weights, of the median token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """The outcome: the mode of the span, why it is not faster, and the largest relative error."""

    mode: Mode
    reason: str
    error: float


def run_self_test(span: Span, tolerance: float | None = None, seed: int = 0) -> SelfTest:
    """Compare ``span`` with its model and let it fall back if necessary.

    Takes about ten small steps. tolerance: the largest relative error allowed; None: 1e-4 if
    ``span.exact``, else 1e-1. Raises ModelNotSupported if the outputs differ from the model's in
    every mode.
    """
    usual = _TOLERANCE if span.exact else _ROUNDED_TOLERANCE
    allowed = tolerance if tolerance is not None else usual
    error = _error_or_inf(span, seed)
    # ``not <=`` and not ``>``: an error of NaN is a failure.
    while not error <= allowed:
        if not span.fall_back(f"run {span.mode} it differs from the model by {error:.1e}"):
            break
        error = _error_or_inf(span, seed)
    if not error <= allowed:
        raise ModelNotSupported(
            f"Blocks {span.blocks} differ by {error:.1e} from the model they were taken from.",
            hint="`petals models check` lists the architectures that work.",
        )
    return SelfTest(mode=span.mode, reason=span.reason, error=error)


def _error_or_inf(span: Span, seed: int) -> float:
    try:
        return _compare_in_strips(span, seed)
    except MODEL_CODE_ERRORS as error:
        logger.warning("The self-test failed: %s: %s", type(error).__name__, error)
        return float("inf")


def _compare_in_strips(span: Span, seed: int) -> float:
    """The largest relative error of ``compare``, for a few blocks at a time.

    Each strip begins with the states that the model's own path gives, so that errors do not add up.
    """
    texts = _random_states(span, torch.Generator().manual_seed(seed))
    # The first text has the rotary factors of one that is too long to be run here.
    lengths = (max(LENGTHS[0], span.rope_limit + 1), *LENGTHS[1:])
    worst = 0.0
    for strip, is_new in _strips(span):
        expected = [span.reference(text, strip, length) for text, length in zip(texts, lengths)]
        steps = STEPS if is_new else BRIEF_STEPS
        error = replay([(span, strip)], steps, texts, expected, lengths)
        worst, texts = max(worst, error, key=_badness), expected
    return worst


def _strips(span: Span) -> list[tuple[BlockSpan, bool]]:
    """Groups of a few blocks, and whether one of them has a signature that no earlier group has."""
    blocks, known = span.blocks, set[Hashable]()
    strips = []
    for start in range(blocks.start, blocks.end, _STRIP_BLOCKS):
        strip = BlockSpan(start, min(start + _STRIP_BLOCKS, blocks.end))
        signatures = {signature_of(span, block) for block in range(strip.start, strip.end)}
        strips.append((strip, not signatures <= known))
        known |= signatures
    return strips


def _random_states(span: Span, random: torch.Generator) -> list[torch.Tensor]:
    return [
        torch.randn((length, span.hidden_size), generator=random).to(span.device, span.dtype)
        for length in LENGTHS
    ]


def compare(span: Span, seed: int = 0, parts: Sequence[BlockSpan] = ()) -> float:
    """Largest relative error of ``STEPS`` against one pass of each text through the whole span.

    ``parts``: the blocks that sessions pass through, one after another; the whole span by default.
    """
    texts = _random_states(span, torch.Generator().manual_seed(seed))
    expected = [span.reference(text) for text in texts]
    stages = [(span, part) for part in parts or (span.blocks,)]
    return replay(stages, STEPS, texts, expected)


def replay(
    stages: Sequence[SpanPart],
    steps: Sequence[TestStep],
    texts: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    rope_lengths: Sequence[int] = LENGTHS,
) -> float:
    """Largest relative error of ``steps`` through ``stages``, one after another.

    texts, expected: for each session the states [n, H] that enter the first stage and should leave
    the last, if they run as one forward. A session has a row per stage. rope_lengths: of the tokens
    of each session.
    """
    rows = [[SlabRow(part, text.shape[0]) for _, part in stages] for text in texts]
    worst = 0.0
    for step in steps:
        states = [texts[session][first:last] for session, first, last in step]
        for stage, (span, part) in enumerate(stages):
            segments = [
                Segment(
                    hidden=hidden,
                    blocks=part,
                    row=rows[session][stage],
                    start=first,
                    # Every step is a piece of the forward that gave ``expected``.
                    rope_lengths=(rope_lengths[session],) * (last - first),
                )
                for hidden, (session, first, last) in zip(states, step)
            ]
            states = span.run(segments)
        errors = [
            relative_error(output, expected[session][first:last], exact=stages[0][0].exact)
            for output, (session, first, last) in zip(states, step)
        ]
        worst = max([worst, *errors], key=_badness)
    return worst


def gradient_test(span: Span, seed: int = 0) -> str:
    """Why ``span`` cannot compute gradients; "" if they equal those of the model's own path.

    Takes one small forward and backward in each of the two ways.
    """
    if span.quant is QuantKind.INT8:
        return "its int8 kernel has no gradient"
    if span.has_narrow_weights and span.quant is QuantKind.NONE:
        # A comparison would not show a branch without gradient: the reference lacks it, too.
        return "nothing is known of gradients through its checkpoint's own quantization"
    try:
        error = compare_gradients(span, seed)
    except MODEL_CODE_ERRORS as failure:
        logger.warning("The test of gradients failed: %s: %s", type(failure).__name__, failure)
        return "its blocks cannot be run backward"
    if not error <= (_TOLERANCE if span.exact else _ROUNDED_TOLERANCE):
        return f"its gradients differ by {error:.1e} from the model's own"
    return ""


def compare_gradients(span: Span, seed: int = 0) -> float:
    """Largest relative error of gradients through ``trace``, against the model's own path.

    Compares a few blocks at a time, and of strips with known signatures none. ``trace`` gets all
    texts in one batch where the span is packed; the reference gets each text by itself.
    """
    random = torch.Generator().manual_seed(seed)
    texts, gradients = (_random_states(span, random) for _ in range(2))
    worst = 0.0
    for strip, is_new in _strips(span):
        if is_new:
            error = _compare_gradients_of(span, strip, texts, gradients)
            worst = max(worst, error, key=_badness)
        texts = [span.reference(text, strip).clone() for text in texts]
    return worst


def _compare_gradients_of(
    span: Span, strip: BlockSpan, texts: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> float:
    worst = 0.0
    batches = [range(len(texts))] if span.mode is Mode.PACKED else [[0], [1], [2]]
    for batch in batches:
        leaf = torch.cat([texts[session] for session in batch]).requires_grad_()
        parts = leaf.split([LENGTHS[session] for session in batch])
        states = [leaf, *span.trace([Segment(hidden=part, blocks=strip) for part in parts])]
        gradient = torch.cat([gradients[session] for session in batch])[None]
        # Block by block, as a server goes back.
        for output, inputs in zip(reversed(states[1:]), reversed(states[:-1])):
            (gradient,) = torch.autograd.grad(output, inputs, gradient)
        for session, found in zip(batch, gradient.split([LENGTHS[session] for session in batch])):
            expected = _reference_gradient(span, strip, texts[session], gradients[session])
            worst = max(worst, relative_error(found, expected, span.exact), key=_badness)
    return worst


def _reference_gradient(
    span: Span, strip: BlockSpan, text: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    leaf = text.clone().requires_grad_()
    (found,) = torch.autograd.grad(span.reference(leaf, strip), leaf, gradient)
    return found


def _badness(error: float) -> float:
    """Sort key for errors: NaN counts as the largest."""
    return float("inf") if error != error else error


def relative_error(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> float:
    """|found - expected| / |expected| of the worst token; NaN if either is not finite.

    If not ``exact`` (half precision, quantized), the median token counts instead of the worst: a
    single token close to a tie between experts may be routed to other ones after rounding.
    """
    found, expected = found.float(), expected.float()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("nan")
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    return float(errors.max() if exact else errors.median())
