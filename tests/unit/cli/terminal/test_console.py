"""Errors are a sentence and a hint on stderr; data goes to stdout; ready files appear whole."""

import json
import os
import signal
from pathlib import Path

import pytest

from petals.cli.terminal import options
from petals.cli.terminal.console import (
    EXIT_FAILED,
    EXIT_WRONG_INPUT,
    interruptible,
    print_json,
    report,
    stage,
)
from petals.cli.terminal.lifetime import write_ready_file
from petals.errors import BadInput, BootstrapFailed, ConfigError, NotEnoughDisk, PetalsError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("That is wrong.", hint="Say it otherwise."), EXIT_WRONG_INPUT),
        (BadInput("The prompt is empty.", hint="Say something."), EXIT_WRONG_INPUT),
        (NotEnoughDisk("The disk became full.", hint="Free some space."), EXIT_WRONG_INPUT),
        (ConfigError("Shapes [2, 3] and [bold] differ.", hint="[x]"), EXIT_WRONG_INPUT),
        (BootstrapFailed("No peer answers.", hint="Check the address."), EXIT_FAILED),
    ],
)
def test_an_error_is_a_sentence_and_a_hint(
    error: PetalsError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error.message}\nhint: {error.hint}\n")


def test_json_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "größer"})
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"text": "größer"}, "")


def test_stages_are_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("first") as activity:
        activity.measure(1, 2)
        activity.change("second")
    assert capsys.readouterr().err == "first\nsecond\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_unwind_also_in_a_background_job(signum: signal.Signals) -> None:
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signum)
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_ready_file_names_the_process(tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    write_ready_file(file, {"peer_id": "x"})
    assert json.loads(file.read_text()) == {"pid": os.getpid(), "peer_id": "x"}
    assert list(tmp_path.iterdir()) == [file]


def test_peers_are_named_by_option_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_INITIAL_PEERS", raising=False)
    with pytest.raises(ConfigError, match="No swarm was named") as caught:
        options.peers_to_join(())
    assert "--join" in caught.value.hint
    monkeypatch.setenv("PETALS_INITIAL_PEERS", "/a, /b\n/c")
    assert options.peers_to_join(()) == ("/a", "/b", "/c")
    assert options.peers_to_join(("/d",)) == ("/d",)
