"""Checkpoints that differ in a few tensors or settings from a whole one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from petals.testing.tiny_models import PUBLISHED
from support.models import WriteModel


@pytest.fixture
def edited(tiny_folder: WriteModel, tmp_path: Path) -> WriteModel:
    """``edited(model_type, tensors=None, published=False, **settings)`` -> a new folder of a model.

    ``tensors``: replaced in the only file, or dropped if None. ``settings``: put in config.json.
    """

    def edit(
        model_type: str,
        tensors: Mapping[str, Tensor | None] | None = None,
        published: bool = False,
        **settings: object,
    ) -> Path:
        whole = tiny_folder(model_type, PUBLISHED[model_type] if published else None)
        folder = shutil.copytree(whole, tmp_path / "model", dirs_exist_ok=True)
        if tensors:
            file = folder / "model.safetensors"
            changed = {**load_file(file), **tensors}
            save_file({name: held for name, held in changed.items() if held is not None}, file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return edit
