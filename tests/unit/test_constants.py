"""Folders of users without a home."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from petals.constants import cache_dir


def test_a_user_without_home_and_name_has_a_cache_among_the_temporary_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "PETALS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert cache_dir() == Path(tempfile.gettempdir()) / f"petals-cache-{os.getuid()}"
