"""Only the tensors of a part are read, and only the files that hold them."""

import pytest
from safetensors.torch import load_file, save_file

from petals.errors import ModelFilesBroken
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.checkpoint.weights import open_tensors
from petals.models.loading.split import LoadOptions, load_blocks
from petals.testing.tiny_models import PUBLISHED
from petals.types import BlockSpan
from support.models import WriteModel


@pytest.mark.parametrize("model_type", ["bloom", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("span", [BlockSpan(0, 1), BlockSpan(2, 4), BlockSpan(4, 5)], ids=str)
def test_other_files_are_never_opened(model_type: str, span: BlockSpan, edited: WriteModel) -> None:
    folder = edited(model_type, published=True)
    weight_map = open_checkpoint(str(folder)).weight_map
    holding = {
        file
        for key, file in weight_map.items()
        if any(f"h.{i}." in key or f"layers.{i}." in key for i in range(span.start, span.end))
    }
    others = set(weight_map.values()) - holding
    assert len(others) >= 2
    for name in others:
        (folder / name).write_bytes(b"never read")
    assert load_blocks(str(folder), span).blocks == span


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("bloom", "h.0.self_attention.query_key_value.weight"),
        ("bloom", "word_embeddings_layernorm.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("deepseek_v3", "model.layers.2.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_published_names_are_as_on_the_hub(
    model_type: str, name: str, tiny_folder: WriteModel
) -> None:
    folder = tiny_folder(model_type, PUBLISHED[model_type])
    assert name in open_checkpoint(str(folder)).weight_map


def test_progress_counts_every_byte_once(tiny_folder: WriteModel) -> None:
    seen: list[tuple[int, int]] = []
    options = LoadOptions(progress=lambda done, total: seen.append((done, total)))
    loaded = load_blocks(str(tiny_folder("llama")), BlockSpan(1, 3), options)
    num_bytes = sum(p.numel() * p.element_size() for p in loaded.layers.parameters())
    assert max(seen) == (num_bytes, num_bytes)
    assert {total for _, total in seen} == {num_bytes}


def test_damaged_file(edited: WriteModel) -> None:
    folder = edited("bloom", published=True)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelFilesBroken, match="damaged"):
        load_blocks(str(folder), BlockSpan(0, 5))


def test_tensor_listed_but_absent(edited: WriteModel) -> None:
    folder = edited("bloom", published=True)
    checkpoint = open_checkpoint(str(folder))
    key, file = next(iter(checkpoint.weight_map.items()))
    tensors = load_file(folder / file)
    del tensors[key]
    save_file(tensors, folder / file)
    with pytest.raises(ModelFilesBroken, match="damaged"), open_tensors(checkpoint, [key]):
        pass
