"""Adapters in a packed batch, against stock peft."""

from pathlib import Path

import pytest
import torch

from petals.models.adapters.files import read_adapter
from petals.models.adapters.low_rank import Adapter, check_fits
from petals.models.loading.quantize import QuantKind
from petals.models.loading.split import LoadOptions, load_blocks
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import SlabRow
from petals.models.runtime.span import Span
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.peft_adapters import peft_model, save_adapter, through_blocks, token_ids
from support.reference import assert_close

ALL = BlockSpan(0, 5)
KINDS = ("llama", "bloom", "gpt2", "mixtral")
LAYERS = {"bloom": "h", "gpt2": "h", "llama": "layers", "mixtral": "layers"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_tiny_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def span_of(folder: Path, blocks: BlockSpan = ALL, **options) -> Span:
    return Span(load_blocks(str(folder), blocks, LoadOptions(**options)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_of_peft_gives_what_peft_gives(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = peft_model(folders[kind], seed=1, use_rslora=kind == "bloom")
    model.save_pretrained(tmp_path)
    states, expected = through_blocks(model, token_ids(9))
    span = span_of(folders[kind])
    adapter = read_adapter(str(tmp_path), LAYERS[kind]).adapter
    check_fits(adapter, span.slots)
    (output,) = span.run([Segment(hidden=states, blocks=ALL, adapter=adapter)])
    assert_close(output, expected)
    (plain,) = span.run([Segment(hidden=states, blocks=ALL)])
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    assert_close(plain, span.reference(states))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_adapters_of_different_ranks_run_in_one_forward(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Three sessions with adapters and one without decode together; each is as if alone."""
    span = span_of(folders[kind])
    models, adapters = [], []
    for rank in (2, 4, 7):
        model = peft_model(folders[kind], seed=rank, r=rank)
        model.save_pretrained(tmp_path / str(rank))
        models.append(model)
        adapters.append(read_adapter(str(tmp_path / str(rank)), LAYERS[kind]).adapter)
    models.insert(1, peft_model(folders[kind], r=1))
    models[1].disable_adapter_layers()
    adapters.insert(1, None)
    texts = [through_blocks(model, token_ids(8 + n, n)) for n, model in enumerate(models)]
    rows = [SlabRow(ALL, 16) for _ in texts]
    calls: list[int] = []
    span.base.register_forward_pre_hook(lambda *_: calls.append(1))
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for start, end in ((0, 5), (5, 6), (6, 8)):
        outputs = span.run(
            [
                Segment(hidden=text[start:end], blocks=ALL, row=row, start=start, adapter=adapter)
                for (text, _), row, adapter in zip(texts, rows, adapters)
            ]
        )
        for pieces, output in zip(found, outputs):
            pieces.append(output)
    assert len(calls) == 3
    for pieces, (_, expected) in zip(found, texts):
        assert_close(torch.cat(pieces), expected[:8])


@torch.no_grad()
def test_one_adapter_for_rows_that_do_not_lie_side_by_side(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = peft_model(folders["llama"], seed=3)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path), "layers").adapter
    span = span_of(folders["llama"])
    texts = [through_blocks(model, token_ids(4 + n, n)) for n in range(3)]
    plain = texts[1][0]
    segments = [Segment(hidden=text, blocks=ALL, adapter=adapter) for text, _ in texts]
    segments[1].adapter = None
    outputs = span.run(segments)
    assert_close(outputs[0], texts[0][1])
    assert_close(outputs[1], span.reference(plain))
    assert_close(outputs[2], texts[2][1])


@torch.no_grad()
def test_part_of_a_span_takes_its_part_of_an_adapter(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = peft_model(folders["llama"], seed=4)
    model.save_pretrained(tmp_path)
    states, expected = through_blocks(model, token_ids(6), first=2, last=3)
    span = span_of(folders["llama"], BlockSpan(1, 5))
    part = read_adapter(str(tmp_path), "layers", BlockSpan(1, 5)).adapter
    assert {block for block, _ in part.parts} == {1, 2, 3, 4}
    blocks = BlockSpan(2, 4)
    for adapter in (part, part.within(blocks)):
        (output,) = span.run([Segment(hidden=states, blocks=blocks, adapter=adapter)])
        assert_close(output, expected)


@torch.no_grad()
def test_int8_blocks_take_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(folders["gpt2"], tmp_path, seed=5)
    adapter = read_adapter(str(tmp_path), "h").adapter
    wide, narrow = span_of(folders["gpt2"]), span_of(folders["gpt2"], quant=QuantKind.INT8)
    assert narrow.slots == wide.slots
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    expected, found = (
        span.run([Segment(hidden=hidden, blocks=ALL, adapter=adapter)])[0]
        for span in (wide, narrow)
    )
    plain = wide.reference(hidden)
    assert (found - expected).norm() < 0.2 * (found - plain).norm()


@pytest.mark.parametrize("quant", [QuantKind.BNB_INT8, QuantKind.NF4])
def test_quantized_blocks_give_gradients_of_adapters(quant: QuantKind, tmp_path: Path) -> None:
    # bitsandbytes packs 64 weights of a row together.
    folder = write_tiny_model(
        tmp_path / "model", "llama", hidden_size=64, intermediate_size=128, head_dim=32
    )
    adapter_folder = tmp_path / "adapter"
    save_adapter(folder, adapter_folder, seed=5, target_modules=["q_proj", "down_proj"])
    saved = read_adapter(str(adapter_folder), "layers").adapter
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for kind in (QuantKind.NONE, quant):
        span = span_of(folder, dtype=torch.bfloat16, quant=kind)
        adapter = saved.mapped(torch.Tensor.bfloat16).leaves(ALL)
        assert adapter is not None
        output = span.trace([Segment(hidden=hidden, blocks=ALL, adapter=adapter)])[-1][0]
        (again,) = span.run([Segment(hidden=hidden, blocks=ALL, adapter=adapter)])
        assert torch.equal(output, again)
        grads = gradients(output, list(adapter.tensors))
        found.append(torch.cat([grad.flatten().float() for grad in grads]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.8


def gradients(output: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((output * weights).sum(), wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_peft(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = peft_model(folders[kind], seed=6)
    model.save_pretrained(tmp_path)
    states, expected = through_blocks(model, token_ids(7))
    own = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    theirs = dict(zip(own, gradients(expected, list(own.values()))))
    saved = read_adapter(str(tmp_path), LAYERS[kind]).adapter
    adapter: Adapter = saved.mapped(lambda tensor: tensor.clone().requires_grad_())
    span = span_of(folders[kind])
    other = Segment(hidden=torch.randn(3, 32), blocks=ALL)
    segment = Segment(hidden=states.detach(), blocks=ALL, adapter=adapter)
    output = span.trace([other, segment])[-1][0, 3:]
    ours = gradients(output, list(adapter.tensors))
    for (block, module), part in zip(adapter.parts, zip(ours[::2], ours[1::2])):
        for which, gradient in zip("AB", part):
            (name,) = [n for n in theirs if f".{block}.{module}.lora_{which}." in n]
            assert_close(gradient, theirs.pop(name))
    assert not theirs
