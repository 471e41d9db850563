"""The router of a laboratory: a process in C, compiled at its first use, and how to command it."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from netlab.processes import Identity, NetLabError, call, identity

_SOURCES = Path(__file__).with_name("forwarder")
_START_SECONDS = 5.0
_REPLY_SECONDS = 10.0
_MAX_REPLY_BYTES = 1 << 19


def build() -> Path:
    """Compile the forwarder, once per version of its source; returns the program."""
    sources = sorted(_SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "netlab"
    program = cache / f"forwarder-{digest}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = program.with_suffix(f".{os.getpid()}")
        call(["cc", "-O2", "-o", str(draft), str(_SOURCES / "forwarder.c"), "-lm"])
        draft.rename(program)
    return program


class Forwarder:
    """A connection to the forwarder of the laboratory in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> Identity:
        """Start the process. When ours ends, however it does, it removes dead laboratories."""
        clean_up = [sys.executable, "-m", "netlab", "cleanup"]
        words = [str(build()), str(self._folder / "control"), str(os.getpid()), *clean_up]
        tools = str(Path(__file__).parents[1])
        log = self._folder / "forwarder.log"
        with log.open("w") as output:
            self._process = process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": tools},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while self._socket is None:
            try:
                self._socket = self._connect()
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    raise NetLabError(f"The forwarder failed: {log.read_text()}") from None
                time.sleep(0.01)
        started = identity(process.pid)
        assert started is not None
        return started

    def command(self, line: str) -> str:
        """Send a command and return the answer. Raises NetLabError."""
        with self._lock:
            if self._socket is None:
                self._socket = self._connect()
            self._socket.send(line.encode())
            answer = self._socket.recv(_MAX_REPLY_BYTES).decode()
        if answer.startswith("err"):
            raise NetLabError(f"{line!r}: {answer}")
        return answer

    def close(self) -> None:
        """Close the connection; the process is ended by `processes.remove`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def wait(self) -> None:
        """Wait for the end of the process, if it was started here."""
        if self._process is not None:
            self._process.wait()

    def _connect(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            control.connect(str(self._folder / "control"))
        except OSError:
            control.close()
            raise
        control.settimeout(_REPLY_SECONDS)
        return control
