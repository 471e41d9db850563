import logging
from dataclasses import replace

import pytest
import torch

from petals.errors import BadInput, BlocksNotServed, LengthExceeded, SessionGap
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import SlabRow
from petals.models.runtime.span import Mode, Span
from petals.models.verify.self_test import compare, run_self_test
from petals.types import BlockSpan
from support.models import ARCHITECTURES, WIDTH, whole_model

EXACT = 1e-5


@pytest.fixture(scope="module")
def llama() -> Span:
    return whole_model("llama")


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((length, WIDTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_steps_of_three_sessions_equal_the_model(name: str) -> None:
    assert compare(whole_model(name)) < EXACT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_parts_of_a_span_in_sequence_equal_the_whole(name: str) -> None:
    span = whole_model(name)
    parts = (BlockSpan(10, 11), BlockSpan(11, 13), BlockSpan(13, 14))
    assert compare(span, parts=parts) < EXACT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_recurrent_models_run_one_by_one(name: str) -> None:
    expected = Mode.ONE_BY_ONE if name == "qwen3_next" else Mode.PACKED
    assert whole_model(name).mode is expected


@pytest.mark.parametrize("name", ["llama", "bloom", "deepseek_v3"])
def test_one_by_one_is_exact_too(name: str) -> None:
    span = whole_model(name)
    span.fall_back("the test wants it")
    assert span.mode is Mode.ONE_BY_ONE
    assert compare(span) < EXACT


def test_segments_of_different_parts_share_one_step(llama: Span) -> None:
    whole, head, tail = BlockSpan(10, 14), BlockSpan(10, 12), BlockSpan(12, 14)
    a, b = text(5, 1), text(7, 2)
    half = llama.run([Segment(hidden=b, blocks=head)])[0]
    both = llama.run(
        [
            Segment(hidden=a, blocks=whole),
            Segment(hidden=half, blocks=tail),
            Segment(hidden=b, blocks=head),
        ]
    )
    torch.testing.assert_close(both[0], llama.reference(a), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(both[1], llama.reference(b), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(both[2], half, rtol=EXACT, atol=EXACT)


def test_a_neighbour_full_of_nan_changes_nobody(llama: Span) -> None:
    a = text(5, 1)
    spoiled = torch.full((4, WIDTH), float("nan"))
    outputs = llama.run(
        [Segment(hidden=spoiled, blocks=llama.blocks), Segment(hidden=a, blocks=llama.blocks)]
    )
    torch.testing.assert_close(outputs[1], llama.reference(a), rtol=EXACT, atol=EXACT)


def test_taps_show_what_leaves_a_block(llama: Span) -> None:
    a = text(6)
    segment = Segment(hidden=a, blocks=llama.blocks, taps=(10, 12))
    llama.run([Segment(hidden=text(3, 9), blocks=llama.blocks), segment])
    first = llama.run([Segment(hidden=a, blocks=BlockSpan(10, 11))])[0]
    assert sorted(segment.tapped) == [10, 12]
    torch.testing.assert_close(segment.tapped[10], first, rtol=EXACT, atol=EXACT)


def test_prompts_are_added_at_their_positions_only(llama: Span) -> None:
    a, prompt = text(6), text(8, 3).view(4, 2, WIDTH)
    by_hand = a
    for index in range(4):
        by_hand = torch.cat([by_hand[:2] + prompt[index], by_hand[2:]])
        by_hand = llama.run([Segment(hidden=by_hand, blocks=BlockSpan(10 + index, 11 + index))])[0]
    row = SlabRow(llama.blocks, 6)
    first = Segment(hidden=a[:1], blocks=llama.blocks, row=row, prompts=prompt)
    outputs = [llama.run([first])[0]]
    rest = replace(first, hidden=a[1:], start=1)
    outputs.append(llama.run([rest, Segment(hidden=text(2, 5), blocks=llama.blocks)])[0])
    torch.testing.assert_close(torch.cat(outputs), by_hand, rtol=EXACT, atol=EXACT)


def test_gradients_reach_the_inputs(llama: Span) -> None:
    a = text(4).requires_grad_()
    *inner, output = llama.trace([Segment(hidden=a, blocks=llama.blocks)])
    assert torch.equal(output[0], llama.run([Segment(hidden=a.detach(), blocks=llama.blocks)])[0])
    assert len(inner) == len(llama.blocks) - 1
    (first,) = torch.autograd.grad(output, inner[1], torch.ones_like(output), retain_graph=True)
    (rest,) = torch.autograd.grad(inner[1], a, first, retain_graph=True)
    (whole,) = torch.autograd.grad(output, a, torch.ones_like(output))
    assert whole.abs().sum() > 0
    torch.testing.assert_close(rest, whole)


def test_a_step_without_tokens_only_rolls_back(llama: Span) -> None:
    row = SlabRow(llama.blocks, 16)
    llama.run([Segment(hidden=text(6), blocks=llama.blocks, row=row)])
    nothing = Segment(hidden=text(0), blocks=llama.blocks, row=row, start=4)
    assert llama.run([nothing])[0].shape == (0, WIDTH)
    assert row.length == 4


SCALED_ROTARY = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
}


@pytest.mark.parametrize("kind", SCALED_ROTARY)
def test_frequencies_follow_a_sessions_own_length(kind: str) -> None:
    settings = {"rope_parameters": SCALED_ROTARY[kind], "max_position_embeddings": 8}
    span = whole_model("llama", **settings)
    short, middle, long = text(6, 1), text(12, 2), text(30, 3)
    alone = [
        whole_model("llama", **settings).run([Segment(hidden=own, blocks=span.blocks)])[0]
        for own in (short, middle, long)
    ]
    span.run([Segment(hidden=text(40, 4), blocks=span.blocks)])
    together = span.run([Segment(hidden=own, blocks=span.blocks) for own in (short, middle, long)])
    for own, other in zip(alone, together):
        torch.testing.assert_close(own, other, rtol=EXACT, atol=EXACT)
    changed = whole_model("llama").run([Segment(hidden=long, blocks=span.blocks)])[0]
    assert not torch.allclose(changed, alone[2], rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_fork_goes_its_own_way(name: str) -> None:
    span = whole_model(name)
    stem, left, right = text(5, 1), text(3, 2), text(4, 3)
    row = SlabRow(span.blocks, 16)
    span.run([Segment(hidden=stem, blocks=span.blocks, row=row)])
    twin = row.fork()
    segments = [
        Segment(hidden=left, blocks=span.blocks, row=row, start=5),
        Segment(hidden=right, blocks=span.blocks, row=twin, start=5),
    ]
    outputs = span.run(segments)
    for own, output in zip((left, right), outputs):
        expected = span.reference(torch.cat([stem, own]))[5:]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_rollbacks_behind_every_snapshot_are_exact() -> None:
    span = whole_model("qwen3_next")
    a = text(20)
    row = SlabRow(span.blocks, 20)
    for position in range(20):
        one = Segment(hidden=a[position : position + 1], blocks=span.blocks, row=row)
        span.run([replace(one, start=position)])
    for start in (17, 3, 12):
        again = Segment(hidden=a[start:], blocks=span.blocks, row=row, start=start)
        output = span.run([again])[0]
        torch.testing.assert_close(output, span.reference(a)[start:], rtol=1e-4, atol=1e-4)


class TestRefuses:
    def test_blocks_of_others(self, llama: Span) -> None:
        with pytest.raises(BlocksNotServed):
            llama.run([Segment(hidden=text(1), blocks=BlockSpan(9, 12))])

    def test_a_gap(self, llama: Span) -> None:
        row = SlabRow(llama.blocks, 8)
        with pytest.raises(SessionGap):
            llama.run([Segment(hidden=text(1), blocks=llama.blocks, row=row, start=3)])

    def test_a_wrong_width(self, llama: Span) -> None:
        with pytest.raises(BadInput):
            llama.run([Segment(hidden=torch.zeros(1, WIDTH + 1), blocks=llama.blocks)])

    def test_positions_the_model_never_learned(self) -> None:
        span = whole_model("codegen", max_position_embeddings=24)
        with pytest.raises(LengthExceeded, match="24"):
            span.run([Segment(hidden=text(25), blocks=span.blocks)])

    def test_more_than_the_row_was_opened_for(self, llama: Span) -> None:
        row = SlabRow(llama.blocks, 4)
        with pytest.raises(LengthExceeded):
            llama.run([Segment(hidden=text(5), blocks=llama.blocks, row=row)])


def test_a_refused_step_leaves_the_row_usable(llama: Span) -> None:
    a = text(6)
    row = SlabRow(llama.blocks, 6)
    llama.run([Segment(hidden=a[:4], blocks=llama.blocks, row=row)])
    with pytest.raises(LengthExceeded):
        llama.run([Segment(hidden=text(9), blocks=llama.blocks, row=row, start=2)])
    again = Segment(hidden=a[row.length :], blocks=llama.blocks, row=row, start=row.length)
    expected = llama.reference(a)[again.start :]
    torch.testing.assert_close(llama.run([again])[0], expected, rtol=EXACT, atol=EXACT)


def test_the_self_test_catches_a_wrong_fast_path_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    span = whole_model("mistral")
    monkeypatch.setattr("petals.models.runtime.attention._rule_of", lambda mask: _everyone_sees_all)
    with caplog.at_level(logging.WARNING):
        outcome = run_self_test(span)
    assert outcome.mode is Mode.ONE_BY_ONE
    assert outcome.error < EXACT
    assert "differs from the model" in caplog.text


def _everyone_sees_all(
    batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return (key >= 0) & (query >= 0)
