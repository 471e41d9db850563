"""A terminal with a process on it: what a user types and sees, with the keys that they press."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence

READY = "\N{SYMBOL FOR ENQUIRY}"
"""Stands in the text where the command began to read a line."""

CTRL_C, CTRL_D, UP, LEFT, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\x1b[D", "\x1b\r"
_ESCAPES = re.compile(r"\x1b\[[0-9;?>=]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]|\x1b[=>]")
_WHERE_IS_THE_CURSOR = b"\x1b[6n"
_READS_A_LINE = "\x1b[?2004h"
"""What a line editor sends when it is ready: from now on mark what is pasted."""


def pasted(text: str) -> str:
    """As terminals send what is pasted."""
    return f"\x1b[200~{text}\x1b[201~"


class PtyTerminal:
    """Starts ``command`` on a terminal of its own, as the leader of its foreground group."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], columns: int = 80) -> None:
        self._fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

        def take_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            env={"TERM": "xterm-256color", **env},
            stdin=child,
            stdout=child,
            stderr=child,
            preexec_fn=take_the_terminal,
        )
        os.close(child)
        self.raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        """All that was shown, without colours and movements of the cursor."""
        shown = self.raw.decode(errors="replace").replace(_READS_A_LINE, READY)
        return _ESCAPES.sub("", shown).replace("\r", "")

    def type(self, keys: str | bytes) -> None:
        data = keys if isinstance(keys, bytes) else keys.encode()
        while data:  # a terminal takes 4 KB at a time, and shows them meanwhile
            data = data[os.write(self._fd, data[:1024]) :]
            self._read(0)

    def expect(self, text: str, seconds: float = 40.0) -> str:
        """Wait until ``text`` is shown behind what was expected before; return what is between."""
        deadline = time.monotonic() + seconds
        while (at := self.text.find(text, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} was not shown:\n{self.text[self._seen :]}")
        between = self.text[self._seen : at]
        self._seen = at + len(text)
        return between

    def wait(self, seconds: float = 20.0) -> int:
        """The exit status; reads until the process has ended."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def rest(self) -> str:
        """What was shown behind what was expected."""
        return self.text[self._seen :]

    def _read(self, seconds: float) -> bool:
        """Read what arrives within ``seconds``; False if nothing does."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the last process on the terminal has ended
            return False
        if _WHERE_IS_THE_CURSOR in data:
            os.write(self._fd, b"\x1b[1;1R")
        self.raw += data
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._fd)


@contextlib.contextmanager
def on_a_terminal(
    command: Sequence[str], env: Mapping[str, str], columns: int = 80
) -> Iterator[PtyTerminal]:
    terminal = PtyTerminal(command, env, columns)
    try:
        yield terminal
    finally:
        terminal.close()
