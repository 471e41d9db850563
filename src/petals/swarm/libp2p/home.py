"""The folder of one daemon: its sockets and its copy of the identity, for its owner's eyes only.

A socket's path is short on every system, so a deep TMPDIR cannot hold the folder. A process that
was killed leaves its folder behind; the next one of the same user removes it. A forked child does
not remove its parent's folder. Knows no daemon.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from petals.errors import ConfigError

_PREFIX = "petals-"
_LOCK = "lock"
"""Name of a file that the folder's owner keeps locked while it lives."""

_MAX_SOCKET_PATH = 103
"""Longest path (bytes) of a Unix socket on all systems: 107 on Linux, 103 on macOS."""

_LONGEST_NAME = len("/petals-xxxxxxxx/p2pclient-xxxxxxxxxxx.sock")


class DaemonHome:
    """A new folder. ``remove`` it; at the latest the end of the process does.

    Raises ConfigError if there is no folder for temporary files that is writable and short enough.
    """

    def __init__(self) -> None:
        bases = [base for base in _bases() if len(os.fsencode(base)) <= _MAX_BASE]
        for base in bases:
            _remove_abandoned(base)
        self.path, self._lock = _create(bases)
        self._remove = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder. Idempotent; does nothing in a forked child."""
        self._remove()


_MAX_BASE = _MAX_SOCKET_PATH - _LONGEST_NAME


def _bases() -> Iterator[Path]:
    """Folders for temporary files, the user's own choice first."""
    with contextlib.suppress(FileNotFoundError):  # none of the usual ones is writable
        yield Path(tempfile.gettempdir())
    yield from (Path("/tmp"), Path("/var/tmp"))


def _create(bases: list[Path]) -> tuple[Path, int]:
    for base in bases:
        with contextlib.suppress(OSError):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            return path, _locked(path)
    raise ConfigError(
        "There is no folder for the sockets of the network daemon.",
        hint=f"Set TMPDIR to a folder that is writable and whose path has at most {_MAX_BASE} "
        "bytes, for example /tmp.",
    )


def _locked(path: Path) -> int:
    """A descriptor with a lock on the folder. The lock file gets its name once it is locked, so
    that no other process finds it free before.
    """
    new = path / f"{_LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(path / _LOCK)
    return lock


def _remove_abandoned(base: Path) -> None:
    """Remove the folders of this user's processes that have ended without removing them."""
    with contextlib.suppress(OSError):
        for lock in base.glob(f"{_PREFIX}*/{_LOCK}"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(lock)


def _remove_if_abandoned(lock: Path) -> None:
    """Raises OSError, BlockingIOError among them, if another process has the lock."""
    if lock.lstat().st_uid != os.getuid():
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
