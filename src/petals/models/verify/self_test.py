"""The test every server runs before it serves: does the fast path say what the model says?

Three sessions of different lengths, prefill, decode and rollback mixed in shared steps, against
one undisturbed pass of each text through the model's own forward. A span that fails runs its
sessions one by one; one that fails even so is refused. Blocks that differ from tested ones in their
weights only are tested more briefly. Knows no server.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from petals.errors import ModelNotSupported
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import SlabRow
from petals.models.runtime.span import FOREIGN_ERRORS, Mode, Span
from petals.types import BlockSpan

logger = logging.getLogger(__name__)

TestStep = tuple[tuple[int, int, int], ...]
"""(session, first token, last token) for each session that takes part."""

SpanPart = tuple[Span, BlockSpan]
"""A span, and the part of it that sessions run through."""

LENGTHS = (20, 13, 17)
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
"""Prefill whole and in parts, decode alone and in company, rollback by one token and by many."""

BRIEF_STEPS: tuple[TestStep, ...] = (tuple((who, 0, length) for who, length in enumerate(LENGTHS)),)
"""For blocks of a kind that has passed ``STEPS``: weights that are no numbers show here, too."""

_STRIP_BLOCKS = 4
"""Blocks that are compared at once: differences in the last bits grow with every block, and the
states of a test are not those of a text.
"""

_TOLERANCE = 1e-4
_ROUNDED_TOLERANCE = 1e-1


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """Outcome: how the span runs, why not faster, and its largest relative error."""

    mode: Mode
    reason: str
    error: float


def run_self_test(span: Span, tolerance: float | None = None, seed: int = 0) -> SelfTest:
    """Compare, fall back if needed, and tell. Takes about ten small steps.

    Raises ModelNotSupported if even one by one the outputs differ from the model's.
    """
    usual = _TOLERANCE if span.exact else _ROUNDED_TOLERANCE
    allowed = tolerance if tolerance is not None else usual
    error = _try(span, seed)
    while not error <= allowed:
        if not span.fall_back(f"run {span.mode} it differs from the model by {error:.1e}"):
            break
        error = _try(span, seed)
    if not error <= allowed:
        raise ModelNotSupported(
            f"Blocks {span.blocks} differ by {error:.1e} from the model they were taken from.",
            hint="`petals models check` lists the architectures that work.",
        )
    return SelfTest(mode=span.mode, reason=span.reason, error=error)


def _try(span: Span, seed: int) -> float:
    try:
        return _compare_in_strips(span, seed)
    except FOREIGN_ERRORS as error:
        logger.warning("The self-test failed: %s: %s", type(error).__name__, error)
        return float("inf")


def _compare_in_strips(span: Span, seed: int) -> float:
    """As ``compare``, a few blocks at a time: each strip from the states that the model's own path
    brings to it.
    """
    texts = _random_states(span, torch.Generator().manual_seed(seed))
    worst = 0.0
    for strip, is_new in _strips(span):
        expected = [span.reference(text, strip) for text in texts]
        steps = STEPS if is_new else BRIEF_STEPS
        error = replay([(span, strip)], steps, texts, expected)
        worst, texts = max(worst, error, key=_badness), expected
    return worst


def _strips(span: Span) -> list[tuple[BlockSpan, bool]]:
    """A few blocks each, and whether one of them is unlike all blocks before its strip."""
    blocks, known = span.blocks, set[Hashable]()
    strips = []
    for start in range(blocks.start, blocks.end, _STRIP_BLOCKS):
        strip = BlockSpan(start, min(start + _STRIP_BLOCKS, blocks.end))
        kinds = {span.kind_of(block) for block in range(strip.start, strip.end)}
        strips.append((strip, not kinds <= known))
        known |= kinds
    return strips


def _random_states(span: Span, random: torch.Generator) -> list[torch.Tensor]:
    return [
        torch.randn((length, span.hidden_size), generator=random).to(span.device, span.dtype)
        for length in LENGTHS
    ]


def compare(span: Span, seed: int = 0, parts: Sequence[BlockSpan] = ()) -> float:
    """Largest relative error of ``STEPS`` against undisturbed passes of the whole span.

    ``parts``: what each session runs through, one after another; the whole span by default.
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
) -> float:
    """Largest relative error of ``steps`` through ``stages``, from states [n, H] to states."""
    rows = [[SlabRow(part, text.shape[0]) for _, part in stages] for text in texts]
    worst = 0.0
    for step in steps:
        states = [texts[who][first:last] for who, first, last in step]
        for stage, (span, part) in enumerate(stages):
            segments = [
                Segment(hidden=hidden, blocks=part, row=rows[who][stage], start=first)
                for hidden, (who, first, last) in zip(states, step)
            ]
            states = span.run(segments)
        errors = [
            relative_error(output, expected[who][first:last], exact=stages[0][0].exact)
            for output, (who, first, last) in zip(states, step)
        ]
        worst = max([worst, *errors], key=_badness)
    return worst


def gradient_test(span: Span, seed: int = 0) -> str:
    """Why no gradients can be had of ``span``; empty if they equal those of the model's own path.

    Takes a small step forward and back each way.
    """
    if span.quant is QuantKind.INT8:
        return "its int8 kernel has no gradient"
    if span.has_narrow_weights and span.quant is QuantKind.NONE:
        # A branch without gradient would go unnoticed: the model's own path lacks it as well.
        return "nothing is known of gradients through its checkpoint's own quantization"
    try:
        error = compare_gradients(span, seed)
    except FOREIGN_ERRORS as failure:
        logger.warning("The test of gradients failed: %s: %s", type(failure).__name__, failure)
        return "its blocks cannot be run backward"
    if not error <= (_TOLERANCE if span.exact else _ROUNDED_TOLERANCE):
        return f"its gradients differ by {error:.1e} from the model's own"
    return ""


def compare_gradients(span: Span, seed: int = 0) -> float:
    """Largest relative error of gradients through ``trace``, block by block, against those of each
    text by itself through the model's own path; a few blocks at a time, each kind of them once.
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
    together = [range(len(texts))] if span.mode is Mode.PACKED else [[0], [1], [2]]
    for group in together:
        leaf = torch.cat([texts[who] for who in group]).requires_grad_()
        parts = leaf.split([LENGTHS[who] for who in group])
        points = [leaf, *span.trace([Segment(hidden=part, blocks=strip) for part in parts])]
        back = torch.cat([gradients[who] for who in group])[None]
        for end, begin in zip(reversed(points[1:]), reversed(points[:-1])):
            (back,) = torch.autograd.grad(end, begin, back)
        for who, found in zip(group, back.split([LENGTHS[who] for who in group])):
            expected = _gradient_alone(span, strip, texts[who], gradients[who])
            worst = max(worst, relative_error(found, expected, span.exact), key=_badness)
    return worst


def _gradient_alone(
    span: Span, strip: BlockSpan, text: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    leaf = text.clone().requires_grad_()
    (found,) = torch.autograd.grad(span.reference(leaf, strip), leaf, gradient)
    return found


def _badness(error: float) -> float:
    return float("inf") if error != error else error


def relative_error(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> float:
    """|found - expected| / |expected| of the worst token; nan if either is not finite.

    If not ``exact`` (half precision, int8), a token near a tie may be rounded to the other side or
    sent to other experts: then the median token counts and not the worst.
    """
    found, expected = found.float(), expected.float()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("nan")
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    return float(errors.max() if exact else errors.median())
