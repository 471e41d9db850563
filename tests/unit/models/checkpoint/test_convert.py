"""A pickle checkpoint becomes the same model in safetensors, or nothing at all."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from petals.errors import ConfigError, ModelFilesBroken, NotEnoughDisk, PickleCheckpointRefused
from petals.models.checkpoint import convert
from petals.models.checkpoint.convert import convert_checkpoint
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.split import load_blocks
from petals.types import BlockSpan
from support.models import WriteModel

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def pickled(tiny_folder: WriteModel, tmp_path: Path) -> Path:
    """A sharded checkpoint as PyTorch wrote them, with a tied tensor stored twice."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    saved = tiny_folder("bloom")
    shutil.copy(saved / "config.json", folder)
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002.bin": names[20:]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_converted_is_the_same_model(
    pickled: Path, tiny_folder: WriteModel, tmp_path: Path
) -> None:
    said: list[tuple[int, int, str]] = []
    target = tmp_path / "new" / "converted"
    checkpoint = open_checkpoint(str(pickled))
    assert convert_checkpoint(checkpoint, target, lambda *news: said.append(news)) == target
    got = load_blocks(str(target), BlockSpan(1, 4))
    expected = load_blocks(str(tiny_folder("bloom")), BlockSpan(1, 4))
    for one, other in zip(got.layers.parameters(), expected.layers.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [done for done, _, _ in said] == [0, 1, 2]
    assert not list(target.parent.glob(".convert-*"))


def test_single_file(tiny_folder: WriteModel, tmp_path: Path) -> None:
    saved = tiny_folder("llama")
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    torch.save(load_file(saved / "model.safetensors"), folder / "pytorch_model.bin")
    target = convert_checkpoint(open_checkpoint(str(folder)), tmp_path / "converted")
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert len(load_blocks(str(target), BlockSpan(0, 5)).layers) == 5


class Bomb:
    """What a malicious checkpoint holds: code that runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_inside_is_refused_and_not_run(pickled: Path, tmp_path: Path) -> None:
    torch.save({"weight": Bomb(tmp_path / "ran")}, pickled / "pytorch_model-00002.bin")
    with pytest.raises(PickleCheckpointRefused, match="more than tensors"):
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


def test_no_room_is_seen_before_writing(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: Usage(10, 10, 5))
    with pytest.raises(NotEnoughDisk, match="are needed, 5 are free") as caught:
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path / "converted")
    assert "larger disk" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


def test_disk_that_fills_up_while_writing(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(NotEnoughDisk, match="became full"):
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


def test_damaged_pickle(pickled: Path, tmp_path: Path) -> None:
    path = pickled / "pytorch_model-00002.bin"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelFilesBroken, match="damaged"):
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path / "converted")


def test_nothing_to_convert(tiny_folder: WriteModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesBroken, match=r"no pytorch_model\.bin"):
        convert_checkpoint(open_checkpoint(str(tiny_folder("llama"))), tmp_path / "converted")


def test_target_that_exists(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path)


def test_index_that_points_outside(pickled: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"weight": "../../secret.bin"}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesBroken, match="points outside"):
        convert_checkpoint(open_checkpoint(str(pickled)), tmp_path / "converted")
