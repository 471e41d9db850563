"""Which processes are Petals, and what is known about them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from petals.cli.commands.ps import find_running, petals_command, ps
from petals.cli.terminal.lifetime import listed_as_running, running_dir


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("/usr/bin/python3 /venv/bin/petals serve /models/tiny --blocks 0:2", ("serve", "tiny")),
        ("petals serve OWNER/NAME", ("serve", "NAME")),
        ("python -m petals.cli serve --port 1", ("serve", "")),
        ("python -u -X dev -m petals.cli.main serve m", ("serve", "m")),
        ("python -m petals.cli.run_server m --new_swarm", ("run_server", "m")),
        ("python3.11 /src/petals/cli/__main__.py bootstrap --port 1", ("bootstrap", "")),
        ("python -m petals.cli.run_dht", ("run_dht", "")),
        ("petals swarm up m --servers 3", ("swarm", "m")),
        ("petals demo", ("demo", "")),
        ("petals swarm new-key file", None),
        ("petals chat m", None),
        ("petals", None),
        ("vim serve", None),
        ("python main.py serve", None),
        ("python -c petals serve", None),
        ("python", None),
        ("", None),
    ],
)
def test_command_lines(words: str, found: tuple[str, str] | None) -> None:
    assert petals_command(words.split()) == found


def test_a_server_is_listed_with_what_it_has_published(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = cache / "petals"
    script.write_text("import time; time.sleep(60)")
    server = subprocess.Popen([sys.executable, str(script), "serve", "a/tiny"])
    try:
        (starting,) = [each for each in find_running() if each.pid == server.pid]
        assert (starting.command, starting.model, starting.blocks) == ("serve", "tiny", None)
        file = running_dir() / f"{server.pid}.json"
        file.parent.mkdir(parents=True)
        facts = {"pid": server.pid, "model": "tiny-1", "blocks": [0, 2], "peer_id": "12D3abcdef"}
        file.write_text(json.dumps(facts))
        (online,) = [each for each in find_running() if each.pid == server.pid]
        assert (online.model, online.blocks, online.peer_id) == ("tiny-1", (0, 2), "12D3abcdef")
        assert online.memory_bytes > 0
        ps(as_json=False)
        heads, *rows = capsys.readouterr().out.splitlines()
        (row,) = [row for row in rows if row.startswith(str(server.pid))]
        assert heads.split() == ["PID", "COMMAND", "MODEL", "BLOCKS", "MEMORY", "UP", "PEER"]
        assert row.split()[1:4] == ["serve", "tiny-1", "0:2"]
        os.utime(file, (time.time() - 1000,) * 2)  # written by an earlier process of this pid
        (again,) = [each for each in find_running() if each.pid == server.pid]
        assert again.blocks is None
    finally:
        server.kill()
        server.wait()


def test_what_a_process_publishes_is_taken_back(cache: Path) -> None:
    file = running_dir() / f"{os.getpid()}.json"
    with listed_as_running() as publish:
        publish({"blocks": [0, 2]})
        assert json.loads(file.read_text())["blocks"] == [0, 2]
    assert not file.exists()


def test_a_cache_that_cannot_be_written_stops_no_server(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("PETALS_CACHE", str(cache / "file"))
    with listed_as_running() as publish:
        publish({})
