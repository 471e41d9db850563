"""What goes wrong before any network: a status, a sentence and a hint on stderr, nothing else."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from petals.cli.main import app
from petals.cli.terminal.console import run_as_command
from petals.testing.tiny_models import write_tiny_model
from support.tiny_tokenizer import write_tokenizer

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKjS9yJsQwDbD5oCqgKcKqEYvuQVvzJ3nSSBDeJXNbXhr"
GENERATE = ("generate", "MODEL", "--prompt", "Once", "--join", NOBODY)
SERVE = ("serve", "MODEL", "--host", "127.0.0.1")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set up the log of the whole process."""
    monkeypatch.setattr("petals.logs.configure_logging", lambda: None)
    for name in ("PETALS_INITIAL_PEERS", "PETALS_SWARM_KEY"):
        monkeypatch.delenv(name, raising=False)


class Failed:
    """A command that ended with an error."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as caught:
            run_as_command(lambda: app(arguments))
        told = capsys.readouterr()
        assert told.out == ""
        assert "Traceback" not in told.err
        self.status = caught.value.code
        self.error, _, self.hint = told.err.partition("error: ")[2].partition("hint: ")
        assert self.error.strip() and self.hint.strip()


def command(form: tuple[str, ...], model: Path | str) -> tuple[str, ...]:
    return tuple(str(model) if word == "MODEL" else word for word in form)


@pytest.mark.parametrize("form", [GENERATE, SERVE], ids=["generate", "serve"])
class TestModels:
    def test_a_path_that_is_not_there(
        self, form: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failed = Failed(capsys, *command(form, tmp_path / "none"))
        assert failed.status == 2
        assert "There is no folder" in failed.error
        assert "OWNER/NAME" in failed.hint

    def test_a_file(
        self, form: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        failed = Failed(capsys, *command(form, tmp_path / "model.gguf"))
        assert failed.status == 2
        assert "is a file" in failed.error

    def test_a_folder_without_a_model(
        self, form: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failed = Failed(capsys, *command(form, tmp_path))
        assert failed.status == 2
        assert "has no config.json" in failed.error

    def test_an_unknown_architecture(
        self, form: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "wonder"}))
        failed = Failed(capsys, *command(form, tmp_path))
        assert failed.status == 2
        assert "'wonder'" in failed.error
        assert "transformers" in failed.hint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=1)


def test_a_model_without_a_tokenizer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Failed(capsys, *command(GENERATE, tiny))
    assert failed.status == 2
    assert "no tokenizer" in failed.error
    assert "tokenizer.json" in failed.hint


def pickled(tiny: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04." * 1000)
    return folder


def test_pickled_weights_name_the_command_that_converts_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pickled(tiny, tmp_path / "old")
    write_tokenizer(folder)
    failed = Failed(capsys, *command(GENERATE, folder))
    assert failed.status == 2
    assert f"petals models convert {folder} old-safetensors" in failed.hint


def test_a_full_disk_while_converting(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("petals.models.checkpoint.convert._write_shards", full)
    folder = pickled(tiny, tmp_path / "old")
    failed = Failed(capsys, "models", "convert", str(folder), str(tmp_path / "new"))
    assert failed.status == 2
    assert "disk" in (failed.error + failed.hint).lower()
    assert not (tmp_path / "new").exists()


def test_no_swarm_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Failed(capsys, "generate", "any/model", "--prompt", "Once")
    assert failed.status == 2
    assert "--join" in failed.hint


def test_an_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Failed(capsys, "generate", "any/model", "--prompt", " ", "--join", NOBODY)
    assert failed.status == 2
    assert "prompt is empty" in failed.error


def test_an_address_that_is_none(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Failed(capsys, "status", "--join", "localhost:31337")
    assert failed.status == 2
    assert "/ip4/" in failed.hint


@pytest.mark.parametrize("blocks", ["5", "b:a", "4:2", "0:9"])
def test_blocks_that_cannot_be(tiny: Path, blocks: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Failed(capsys, "serve", str(tiny), "--blocks", blocks)
    assert failed.status == 2
