"""What goes wrong before any network: status 2, a sentence and a hint on stderr, nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from petals.cli.main import app
from petals.cli.terminal.console import run_as_command
from petals.testing.tiny_models import write_tiny_model
from support.tiny_tokenizer import write_tokenizer

UNREACHABLE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKjS9yJsQwDbD5oCqgKcKqEYvuQVvzJ3nSSBDeJXNbXhr"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are no complete model, each under the name of what it is."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "file").write_bytes(b"GGUF")
    for name in ("empty", "unknown", "pickled"):
        (folder / name).mkdir()
    (folder / "unknown" / "config.json").write_text(json.dumps({"model_type": "wonder"}))
    write_tiny_model(folder / "tiny", "llama", num_hidden_layers=1)
    shutil.copy(folder / "tiny" / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04." * 1000)
    write_tokenizer(folder / "pickled")
    _write_coded(folder / "coded")
    return folder


def _write_coded(folder: Path) -> None:
    """A model whose tokenizer is Python code, which leaves a file when it runs."""
    write_tiny_model(folder, "llama", num_hidden_layers=1)
    write_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["code.Coded", None]}, "tokenizer_class": "Coded"}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")


@pytest.mark.parametrize("command", ["generate ./coded --prompt Once", "chat ./coded"])
def test_code_of_a_repository_is_never_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    models: Path,
    command: str,
) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(f"the terminal was asked: {question}")

    monkeypatch.setattr("builtins.input", ask)
    assert_refused(
        capsys,
        [*command.split(), "--join", UNREACHABLE],
        "Python code of its repository, which Petals does not run",
        "tokenizer.json",
    )
    assert not (models / "coded" / "ran").exists()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """Commands set up the log of the whole process."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("petals.logs.configure_logging", lambda: None)
    for name in ("PETALS_INITIAL_PEERS", "PETALS_SWARM_KEY"):
        monkeypatch.delenv(name, raising=False)


def assert_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, hint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_as_command(lambda: app(arguments))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert "Traceback" not in err
    sentence, _, advice = err.partition("error: ")[2].partition("hint: ")
    assert error in sentence and hint in advice
    assert sentence.strip() and advice.strip()


@pytest.mark.parametrize(
    "command",
    ["generate {} --prompt Once --join " + UNREACHABLE, "serve {} --host 127.0.0.1"],
    ids=["generate", "serve"],
)
@pytest.mark.parametrize(
    ("model", "error", "hint"),
    [
        ("./none", "There is no folder", "OWNER/NAME"),
        ("./file", "is a file", ""),
        ("./empty", "has no config.json", ""),
        ("./unknown", "'wonder'", "transformers"),
        ("./pickled", "pickle", "petals models convert ./pickled pickled-safetensors"),
    ],
)
def test_what_is_no_model(
    capsys: pytest.CaptureFixture[str], command: str, model: str, error: str, hint: str
) -> None:
    assert_refused(capsys, command.format(model).split(), error, hint)


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (f"generate ./tiny --prompt Once --join {UNREACHABLE}", "no tokenizer", "tokenizer.json"),
        ("generate any/model --prompt Once", "", "--join"),
        (f"generate any/model --prompt= --join {UNREACHABLE}", "prompt is empty", ""),
        (f"generate m --prompt gr\udcfcn --join {UNREACHABLE}", "prompt is not UTF-8", "iconv"),
        (f"chat m --system \udcff --join {UNREACHABLE}", "system prompt is not UTF-8", "iconv"),
        ("demo --prompt \ud83d", "prompt is not text", "UTF-8"),
        ("status --join localhost:31337", "", "/ip4/"),
        ("models convert ./pickled ./new", "is damaged", "download"),
        *((f"serve ./tiny --blocks {blocks}", "", "") for blocks in ("5", "b:a", "4:2", "0:9")),
    ],
)
def test_what_is_no_command(
    capsys: pytest.CaptureFixture[str], arguments: str, error: str, hint: str
) -> None:
    assert_refused(capsys, arguments.split(), error, hint)
