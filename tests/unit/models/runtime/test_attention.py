"""Packed attention against one plain softmax per segment."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from petals.models.runtime import attention
from petals.models.runtime.attention import (
    AttentionOptions,
    MaskNotUnderstood,
    attend_packed,
    packed_attention,
)
from petals.models.runtime.batch import BatchContext, Segment, activate
from petals.types import BlockSpan

SPAN = BlockSpan(0, 1)
HEADS, KV_HEADS, WIDTH = 6, 2, 8
LENGTHS = ((0, 5), (9, 10), (3, 7), (20, 21))
"""(start, end) of four segments: prefill, decode, verification, decode."""


def batch() -> tuple[BatchContext, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """A context whose segments are in attention, and (query, keys, values) of each segment."""
    random = torch.Generator().manual_seed(0)
    segments, parts = [], []
    for start, end in LENGTHS:
        segments.append(Segment(hidden=torch.zeros(end - start, 4), blocks=SPAN, start=start))
        parts.append(
            (
                torch.randn((HEADS, end - start, WIDTH), generator=random),
                torch.randn((KV_HEADS, end, WIDTH), generator=random),
                torch.randn((KV_HEADS, end, WIDTH), generator=random),
            )
        )
    context = BatchContext(segments, SPAN, packed=True)
    context.kv = [(keys, values) for _, keys, values in parts]
    return context, parts


def run(context: BatchContext, parts: list[Any], options: AttentionOptions) -> list[torch.Tensor]:
    query = torch.cat([part[0] for part in parts], dim=1).unsqueeze(0)
    output = attend_packed(context, (query, query, query), options)
    assert output.shape == (1, context.total, HEADS, WIDTH)
    return [output[0, first:last] for _, first, last in context.parts]


def plainly(part: Any, start: int, options: AttentionOptions) -> torch.Tensor:
    """[n, heads, width] in double precision, one head and one query at a time."""
    query, keys, values = (tensor.double() for tensor in part)
    output = torch.empty(query.shape[1], HEADS, WIDTH)
    scaling = options.scaling or WIDTH**-0.5
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for index in range(query.shape[1]):
            scores = keys[group] @ query[head, index] * scaling
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            if options.bias is not None:
                scores = scores + options.bias(keys.shape[1])[head].double()
            zero = torch.zeros((), dtype=torch.long)
            seen = options.rule(zero, zero, torch.tensor(start + index), torch.arange(len(scores)))
            scores = scores.masked_fill(~seen, -torch.inf)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head].double().view(1)])
            weights = scores.softmax(0)[: keys.shape[1]]
            output[index, head] = weights @ values[group]
    return output


CASES = {
    "causal": AttentionOptions(),
    "scaled": AttentionOptions(scaling=0.3),
    "window": AttentionOptions(rule=sliding_window_causal_mask_function(4)),
    "chunks": AttentionOptions(
        rule=chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    ),
    "soft cap": AttentionOptions(softcap=0.5),
    "soft cap in a window": AttentionOptions(
        softcap=0.5, scaling=0.7, rule=sliding_window_causal_mask_function(3)
    ),
    "sinks": AttentionOptions(sinks=torch.linspace(-1, 2, HEADS)),
    "sinks in a window": AttentionOptions(
        sinks=torch.linspace(-1, 2, HEADS), rule=sliding_window_causal_mask_function(4)
    ),
    "alibi": AttentionOptions(
        bias=lambda n: torch.linspace(0.1, 1, HEADS)[:, None] * torch.arange(n)
    ),
}


@pytest.mark.parametrize("chunk_tokens", [attention.CHUNK_TOKENS, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_segment_is_attended_as_if_alone(
    name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK_TOKENS", chunk_tokens)
    context, parts = batch()
    for output, part, (start, _) in zip(run(context, parts, CASES[name]), parts, LENGTHS):
        expected = plainly(part, start, CASES[name])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_masks_are_made_once_per_step_and_not_once_per_block() -> None:
    context, parts = batch()
    asked = []

    def counting(*args: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return sliding_window_causal_mask_function(4)(*args)

    options = AttentionOptions(rule=counting)
    for _ in range(3):
        context.kv = [(keys, values) for _, keys, values in parts]
        run(context, parts, options)
    assert len(asked) == len(LENGTHS)


def test_a_segment_that_takes_no_part_gets_zeros() -> None:
    context, parts = batch()
    context.active = [context.parts[1], context.parts[3]]
    assert context.kv is not None
    context.kv = [context.kv[1], context.kv[3]]
    outputs = run(context, parts, AttentionOptions())
    assert not outputs[0].any() and not outputs[2].any()
    for index in (1, 3):
        expected = plainly(parts[index], LENGTHS[index][0], AttentionOptions())
        torch.testing.assert_close(outputs[index], expected, rtol=1e-5, atol=1e-5)


def test_pasts_given_one_after_another_are_split() -> None:
    context, parts = batch()
    context.kv = None
    query, keys, values = (torch.cat([p[i] for p in parts], dim=1)[None] for i in range(3))
    output = attend_packed(context, (query, keys, values), AttentionOptions())
    for (_, first, last), part, (start, _) in zip(context.parts, parts, LENGTHS):
        expected = plainly(part, start, AttentionOptions())
        torch.testing.assert_close(output[0, first:last], expected, rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_models_own_is_refused() -> None:
    context, parts = batch()
    query, keys, values = (tensor[None] for tensor in parts[0])
    module = torch.nn.Identity()
    with activate(context), pytest.raises(MaskNotUnderstood):
        packed_attention(module, query, keys, values, torch.zeros(1, 1, 5, 5))


def test_a_past_of_other_length_is_refused() -> None:
    context, parts = batch()
    query, keys, values = parts[0]
    with pytest.raises(MaskNotUnderstood):
        context.kv = None
        attend_packed(context, (query[None], keys[None], values[None]), AttentionOptions())


def test_a_rule_is_compared_by_identity_within_one_step_only() -> None:
    context, parts = batch()
    first = run(context, parts, AttentionOptions(rule=causal_mask_function))
    context.kv = [(keys, values) for _, keys, values in parts]
    narrow = replace(CASES["window"], scaling=None)
    second = run(context, parts, narrow)
    assert not torch.allclose(first[0], second[0])
