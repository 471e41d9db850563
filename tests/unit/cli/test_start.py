"""Commands that load no model start without torch; names, help and completion of all of them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import petals
from petals.cli.main import app
from petals.cli.terminal.console import run_as_command
from petals.errors import BootstrapFailed
from petals.logs import plural

SRC = Path(petals.__file__).parent
HEAVY = {"torch", "transformers", "scipy", "prompt_toolkit"}
UNREACHABLE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKjS9yJsQwDbD5oCqgKcKqEYvuQVvzJ3nSSBDeJXNbXhr"
WORDS = (
    "--help",
    "-h",
    "--version",
    "serve -h",
    "chat --help",
    "ls",
    "ps",
    f"status --join {UNREACHABLE}",
)
IMPORTED = """
import sys
from petals.cli.main import main
try:
    main()
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run(tmp_path: Path, code: str, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PETALS_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path),
        **more,
    }
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", WORDS)
def test_no_torch_is_imported(words: str, tmp_path: Path) -> None:
    result = run(tmp_path, IMPORTED, *words.split())
    imported = ast.literal_eval(result.stdout.splitlines()[-1])
    assert "petals" in imported and not HEAVY & {*imported}
    assert result.returncode == (1 if words.startswith("status") else 0)
    assert ("hivemind" in imported) == words.startswith("status"), "status has gone to the network"


def test_a_program_that_uses_hivemind_itself_sees_all_of_it(tmp_path: Path) -> None:
    code = """
import petals.swarm.libp2p.engine
import sys
assert "torch" not in sys.modules
import hivemind
from hivemind.utils import MPFuture, get_dht_time, nested_flatten
from hivemind import DHT, Optimizer
print(hivemind.__version__, hivemind.dht.DHT is DHT, hivemind.utils.TensorDescriptor.__name__)
try:
    hivemind.wonder
except AttributeError as error:
    print("no", error.args[0][-7:-1])
"""
    result = run(tmp_path, code)
    assert result.stdout.split()[1:3] == ["True", "TensorDescriptor"], result.stderr
    assert result.stdout.splitlines()[-1] == "no wonder"


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_the_version(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output) == (0, f"{petals.__version__}\n")


def test_a_shell_completes_commands(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['petals']\nfrom petals.cli.main import main\nmain()"
    ask = {"_PETALS_COMPLETE": "complete_bash", "COMP_WORDS": "petals p", "COMP_CWORD": "1"}
    assert run(tmp_path, code, **ask).stdout.split() == ["ps", "pull"]


def test_pictures_are_ascii_in_an_ascii_locale(tmp_path: Path) -> None:
    code = """
from petals.cli.terminal.console import print_data, run_as_command, say
def work():
    print_data("…x ██░· → €")
    say("größer →")
run_as_command(work)
"""
    result = run(tmp_path, code, PYTHONIOENCODING="ascii")
    assert result.stdout == "..x ##+. -> \\u20ac\n"
    assert result.stderr == "gr\\xf6\\xdfer ->\n"


def test_a_hint_speaks_the_language_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BootstrapFailed("No peer answers.", hint="Use another --join ADDR.")

    with pytest.raises(SystemExit):
        run_as_command(fail, {"--join": "--initial_peers"})
    assert "hint: Use another --initial_peers ADDR.\n" in capsys.readouterr().err


def test_one_is_not_plural() -> None:
    assert [plural(n, "server") for n in (0, 1, 2)] == ["0 servers", "1 server", "2 servers"]


COUNTED = re.compile(r" (blocks|bytes|files|messages|models|servers|sessions|tokens)\b(?!/)")
UNCOUNTED = {
    # A limit, which is never one.
    "info.max_length",
}


@pytest.mark.parametrize("file", sorted([*SRC.glob("cli/**/*.py"), SRC / "testing/local_swarm.py"]))
def test_counts_are_printed_by_the_one_rule(file: Path) -> None:
    """A number in a text is followed by no plural noun: ``plural`` prints both."""
    for text in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(text, ast.JoinedStr):
            continue
        for value, after in zip(text.values, text.values[1:]):
            if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                source = ast.unparse(value.value)
                is_counted = COUNTED.match(str(after.value)) and source not in UNCOUNTED
                assert not is_counted, f"line {text.lineno}: {source}{after.value}"


def test_serve_says_what_it_does_before_it_imports_torch(tmp_path: Path) -> None:
    code = """
import sys
from petals.cli.main import main
from petals.cli.terminal import serving
serving.collector_at_rest = lambda: sys.exit("torch" in sys.modules)
main()
"""
    result = run(tmp_path, code, "serve", "OWNER/tiny")
    assert (result.returncode, result.stderr) == (0, "Starting a server for OWNER/tiny\n")
