"""Tiny checkpoints, written once per run and never changed by a test."""

from pathlib import Path

import pytest

from petals.testing.tiny_models import CheckpointLayout, write_tiny_model
from support.models import WriteModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """``tiny_folder(model_type, layout=None)`` -> folder; the same arguments, the same folder."""
    written: dict[tuple[str, CheckpointLayout | None], Path] = {}

    def write(model_type: str, layout: CheckpointLayout | None = None) -> Path:
        key = (model_type, layout)
        if key not in written:
            folder = tmp_path_factory.mktemp(model_type)
            written[key] = write_tiny_model(folder, model_type, layout=layout)
        return written[key]

    return write
