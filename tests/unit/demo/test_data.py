"""Demo data arrives whole and checked, or not at all with a reason."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from petals.demo import data
from petals.demo.data import get_demo_data
from petals.errors import ConfigError, ModelFilesBroken, ModelNotFound


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/ai.yml", "conversations: [[a, b]]")
        archive.writestr("chatterbot_corpus/data/french/ai.yml", "conversations: []")
        archive.writestr("chatterbot_corpus/__init__.py", "raise SystemExit")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(data.DEMO_DATA["dialogues"], sha256=digest)
    monkeypatch.setattr(data, "DEMO_DATA", {"dialogues": entry})
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    return path


def test_only_the_data_comes_out_and_only_once(wheel: Path) -> None:
    folder = get_demo_data("dialogues", source=wheel)
    assert [path.name for path in folder.iterdir()] == ["ai.yml"]
    assert list(folder.parent.iterdir()) == [folder]
    assert get_demo_data("dialogues", source=wheel.parent / "absent.whl") == folder


def test_another_file_is_refused(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(ModelFilesBroken, match="sha256"):
        get_demo_data("dialogues", source=other)
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_what_is_missing_is_named(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no demo data called 'poems'"):
        get_demo_data("poems")
    with pytest.raises(ModelNotFound, match=r"absent\.whl"):
        get_demo_data("dialogues", source=wheel.parent / "absent.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent / "nothing"))
    with pytest.raises(ModelNotFound, match="could not be downloaded") as caught:
        get_demo_data("dialogues")
    assert "--data PATH" in caught.value.hint
