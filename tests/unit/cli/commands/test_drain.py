"""Which process `petals drain` would ask to leave, and which it leaves alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from petals.cli.commands.drain import drain, find_server
from petals.errors import ConfigError

SLEEP = "import time; time.sleep(60)"


@contextmanager
def process(script: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that looks like `python SCRIPT ARGUMENTS` from outside."""
    script.write_text(SLEEP)
    running = subprocess.Popen([sys.executable, str(script), *arguments])
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def ready_file(folder: Path, pid: object) -> Path:
    file = folder / "ready.json"
    file.write_text(json.dumps({"pid": pid}), encoding="utf-8")
    return file


def test_a_server_is_found_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with process(tmp_path / "petals", "serve") as server:
        file = ready_file(tmp_path, server.pid)
        assert find_server(str(server.pid)).pid == find_server(str(file)).pid == server.pid
        drain(str(file), wait=True)
        assert server.wait(5) != 0
    assert f"Server {server.pid} has left." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}'])
def test_what_is_no_ready_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ready.json"
    file.write_text(content)
    for path in (file, tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match="no ready file"):
            find_server(str(path))


@pytest.mark.parametrize("words", [("editor", "serve"), ("petals", "chat")])
def test_others_are_left_alone(tmp_path: Path, words: tuple[str, str]) -> None:
    with (
        process(tmp_path / words[0], words[1]) as other,
        pytest.raises(ConfigError, match="no Petals server"),
    ):
        find_server(str(other.pid))


def test_a_server_that_has_left_is_not_confused_with_its_successor(tmp_path: Path) -> None:
    with process(tmp_path / "petals", "serve") as server:
        file = ready_file(tmp_path, server.pid)
        os.utime(file, (time.time() - 1000, time.time() - 1000))
        with pytest.raises(ConfigError, match="No server runs"):
            find_server(str(file))
    with pytest.raises(ConfigError, match="No server runs"):
        find_server(str(server.pid))
