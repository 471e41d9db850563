"""Folders of network daemons: short paths, nothing left behind, nothing of others removed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from petals.errors import ConfigError
from petals.swarm.libp2p.home import DaemonHome

MAKE_ONE = """
import sys
from petals.swarm.libp2p.home import DaemonHome
home = DaemonHome()
print(home.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder for temporary files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def process_with_a_home(base: Path) -> tuple["subprocess.Popen[bytes]", Path]:
    environment = {**os.environ, "TMPDIR": str(base)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().decode().strip())


def test_it_is_private_and_removed(base: Path) -> None:
    home = DaemonHome()
    assert home.path.parent == base and home.path.stat().st_mode & 0o077 == 0
    home.remove()
    home.remove()
    assert not any(base.iterdir())


@pytest.mark.parametrize("name", ["x" * 100, "a folder " * 9], ids=["long", "long, with blanks"])
def test_a_path_that_is_too_long_for_a_socket_is_not_used(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    deep = base / name
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    home = DaemonHome()
    assert home.path.parent in (Path("/tmp"), Path("/var/tmp"))
    home.remove()


def test_no_folder_at_all(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petals.swarm.libp2p.home._bases", lambda: [base / "missing"])
    with pytest.raises(ConfigError) as caught:
        DaemonHome()
    assert "TMPDIR" in caught.value.hint


def test_a_killed_process_leaves_nothing_for_long(base: Path) -> None:
    killed, left = process_with_a_home(base)
    killed.kill()
    killed.wait()
    assert left.is_dir()
    living, used = process_with_a_home(base)
    assert used.is_dir() and not left.exists()
    home = DaemonHome()
    assert used.is_dir()
    home.remove()
    living.communicate(timeout=20)
    assert not any(base.iterdir())


def test_what_is_not_ours_stays(base: Path) -> None:
    unlocked, other = base / "petals-unlocked", base / "petals-other"
    for folder in (unlocked, other):
        folder.mkdir()
    (other / "lock").symlink_to("/etc/passwd")
    home = DaemonHome()
    assert unlocked.is_dir() and other.is_dir()
    home.remove()


def test_a_forked_child_removes_nothing(base: Path) -> None:
    home = DaemonHome()
    child = os.fork()
    if not child:
        home.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert home.path.is_dir()
    home.remove()
