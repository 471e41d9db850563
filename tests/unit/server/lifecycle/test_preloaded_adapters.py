"""Adapters that an operator names, and what is wrong with some."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petals.errors import AdapterRefused, ConfigError, ModelNotFound
from petals.models.checkpoint.sources import Checkpoint, open_checkpoint
from petals.models.loading.split import load_blocks
from petals.models.runtime.span import Span
from petals.server.lifecycle.preloaded_adapters import read_preloaded
from petals.types import BlockSpan
from support.peft_adapters import save_adapter

BLOCKS = BlockSpan(1, 3)


@pytest.fixture(scope="module")
def poems(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(llama, tmp_path_factory.mktemp("adapters") / "poems")


@pytest.fixture(scope="module")
def checkpoint(llama: Path) -> Checkpoint:
    return open_checkpoint(str(llama))


@pytest.fixture(scope="module")
def span(llama: Path) -> Span:
    return Span(load_blocks(str(llama), BLOCKS))


def test_a_folder_goes_by_its_own_name(poems: Path, checkpoint: Checkpoint, span: Span) -> None:
    found = read_preloaded([f"{poems}/"], checkpoint, span)
    assert list(found) == ["poems"]
    assert {block for block, _ in found["poems"].parts} == {1, 2}
    assert read_preloaded([], checkpoint, span) == {}


def changed(poems: Path, folder: Path, change) -> str:
    target = folder / "changed"
    shutil.copytree(poems, target)
    weights = target / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(weights)).items()}, weights)
    return str(target)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: {k: v * float("nan") for k, v in tensors.items()}, "NaN"),
        (lambda t: {k.replace("q_proj", "w_proj"): v for k, v in t.items()}, "no matrix"),
        (lambda t: t | {"base_model.model.score.weight": torch.zeros(2, 32)}, "clients hold"),
    ],
)
def test_adapters_that_cannot_be_served(
    poems: Path, checkpoint: Checkpoint, span: Span, tmp_path: Path, change, says: str
) -> None:
    with pytest.raises(AdapterRefused, match=says) as caught:
        read_preloaded([changed(poems, tmp_path, change)], checkpoint, span)
    assert caught.value.hint


def test_names_that_cannot_be_announced(
    poems: Path, checkpoint: Checkpoint, span: Span, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="another one is"):
        read_preloaded([str(poems), str(poems)], checkpoint, span)
    long = shutil.copytree(poems, tmp_path / ("p" * 65))
    with pytest.raises(ConfigError, match="too long"):
        read_preloaded([str(long)], checkpoint, span)
    with pytest.raises(ConfigError, match="too many"):
        read_preloaded([str(poems)] * 33, checkpoint, span)
    with pytest.raises(ModelNotFound):
        read_preloaded([str(tmp_path / "none")], checkpoint, span)
